"""A request on whichever replica it runs: what it has drawn is enough to go on at another, bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from msgspec.structs import replace as with_fields

from myserve.cluster.channel import error_from
from myserve.cluster.messages import Entry
from myserve.core.params import SamplingParams
from myserve.engine.outputs import RequestMetrics, TokenOutput
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.requests.stream import RequestStream, StepOutcome

__all__ = ["Placed", "PlacedPart", "blocks_key"]


@dataclass(eq=False, slots=True)
class Placed:
    """One submission: what was asked, and how far each choice has come.

    `params` have the seed that is used, and `max_tokens` as a number of tokens behind the client's own prompt, prior
    tokens included; so each choice can be asked for anew with what it has.
    """

    prompt: list[int]
    params: SamplingParams
    options: SubmitOptions
    loop: asyncio.AbstractEventLoop
    stream: RequestStream = field(init=False)
    drawn: list[list[int]] = field(init=False)  # ids of each choice
    last: list[TokenOutput | None] = field(init=False)  # of each choice
    open: set[int] = field(init=False)
    metrics: dict[int, RequestMetrics] = field(default_factory=dict)
    prompt_is_scored: bool = False  # its logprobs have come
    bits: str = ""  # the class that it draws with
    tells_class: bool = False  # the fleet has had several while it ran
    num_moves: int = 0
    # of its parts, as the fleet that placed them counts
    part_numbers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.drawn = [[] for _ in range(self.options.n)]
        self.last = [None] * self.options.n
        self.open = set(range(self.options.n))

    @property
    def weight_version(self) -> int | None:
        """The version that drew the newest token; None before the first."""
        versions = [token.weight_version for token in self.last if token is not None]
        return max(versions, default=None)

    def metrics_of(self, index: int) -> RequestMetrics:
        """Return what a choice has cost, as far as its replica has told: its first token, and its end."""
        known = self.metrics.get(index) or RequestMetrics(prompt_tokens=len(self.prompt))
        if self.tells_class:
            known = replace(known, replica_class=self.bits)
        last = self.last[index]
        if last is None or not known.time_to_first_token:
            return known
        first = known.arrival_time + known.time_to_first_token
        return replace(known, generation_duration=max(known.generation_duration, last.time - first))


@dataclass(eq=False, slots=True)
class PlacedPart:
    """`n` choices of a request, from `first` on, as one replica is asked for them."""

    placed: Placed
    first: int
    n: int
    started_with: int = 0  # ids that the choice had when it was asked for
    refused_by: frozenset[str] = frozenset()  # replicas whose queue was full

    @property
    def prompt(self) -> list[int]:
        """The ids to compute: the prompt, and behind it what the choice has drawn already."""
        return self.placed.prompt + self.placed.drawn[self.first] if self.n == 1 else self.placed.prompt

    @property
    def params(self) -> SamplingParams:
        placed = self.placed
        is_scored = placed.prompt_is_scored or self.first > 0 or bool(placed.drawn[self.first])
        if placed.params.prompt_logprobs is None or not is_scored:
            return placed.params
        return replace(
            placed.params, prompt_logprobs=None, prompt_logprob_start=0, prompt_logprob_token_ids=()
        )

    @property
    def options(self) -> SubmitOptions:
        options = self.placed.options
        return replace(
            options,
            n=self.n,
            sample_index=options.sample_index + self.first,
            num_prior_tokens=options.num_prior_tokens + len(self.prompt) - len(self.placed.prompt),
            counts_prior_tokens=True,
        )

    @property
    def open(self) -> list[int]:
        """The choices of it that have not ended."""
        return [index for index in range(self.first, self.first + self.n) if index in self.placed.open]

    def again(self) -> list[PlacedPart]:
        """Return what is to be asked for elsewhere: all as one while nothing has come, else choice by choice."""
        placed, left = self.placed, self.open
        if len(left) == self.n and not placed.prompt_is_scored and not any(placed.drawn[i] for i in left):
            return [PlacedPart(placed, self.first, self.n, refused_by=self.refused_by)]
        return [PlacedPart(placed, index, 1, len(placed.drawn[index]), self.refused_by) for index in left]

    def take(self, entry: Entry) -> StepOutcome:
        """Note what a replica has sent; return it as the stream takes it in."""
        placed, index = self.placed, self.first + entry.index
        token = entry.token
        if token is not None:
            before = placed.last[index]
            goes_on_anew = before is not None and before.weight_version != token.weight_version
            if goes_on_anew and self.n == 1 and self._is_first(index):
                # all before it was run again, by other weights than drew it
                token = with_fields(token, recomputed=True)
            placed.drawn[index].append(token.token_id)
            placed.last[index] = token
        if entry.metrics is not None:
            placed.metrics[index] = self._costs(index, entry.metrics, ended=entry.finish_reason is not None)
        if entry.prompt_logprobs is not None:
            placed.prompt_is_scored = True
        if entry.finish_reason is not None:
            placed.open.discard(index)
        return StepOutcome(
            index,
            token,
            entry.finish_reason,
            entry.stop_reason,
            entry.hides_token,
            None if entry.error is None else error_from(entry.error),
            entry.prompt_logprobs,
        )

    def _is_first(self, index: int) -> bool:
        return self.placed.num_moves > 0 and self.started_with == len(self.placed.drawn[index])

    def _costs(self, index: int, now: RequestMetrics, *, ended: bool) -> RequestMetrics:
        """Return a choice's costs: where its prompt was computed again elsewhere, the first time is what counts."""
        before = self.placed.metrics.get(index)
        if self.started_with == 0 or before is None:
            return replace(now, prompt_tokens=len(self.placed.prompt))
        if not ended:
            return before
        return replace(
            before,
            num_draft_tokens=before.num_draft_tokens + now.num_draft_tokens,
            num_accepted_tokens=before.num_accepted_tokens + now.num_accepted_tokens,
        )


def blocks_key(options: SubmitOptions, shares: bool) -> str:
    """Return what requests must agree on for a replica to share their prefixes."""
    client: Sequence[str] = () if shares else (options.client,)
    return "\0".join((*client, options.cache_salt, options.adapter or ""))
