"""One step as data: which tokens of which requests run, what is drawn, which blocks are copied; and a step's limits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.step_costs import AttentionCost

__all__ = ["Batch", "Limits", "ScheduledTokens"]


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """Tokens [start, start + count) of one request, to be run in this step.

    Those behind the request's own tokens are its `draft`'s, which are run to be verified. The first `again` were run
    before, and are run for the recurrent state alone.

    >>> request = Request(id="r", prompt_token_ids=[1, 2, 3], max_tokens=9)
    >>> part = ScheduledTokens(request, start=2, count=3, draft=(7, 8))
    >>> part.token_ids, part.is_decode
    ([3, 7, 8], True)
    """

    request: Request
    start: int
    count: int
    draft: tuple[int, ...] = ()
    drafter: str = ""
    again: int = 0

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens, in their order."""
        known = self.request.token_ids
        end, behind = self.start + self.count, max(0, self.start - len(known))
        return known[self.start : end] + list(self.draft[behind : max(0, end - len(known))])

    @property
    def is_decode(self) -> bool:
        """True where it is one known token, what its state lags behind, and its draft, if it has one."""
        return self.count == self.again + 1 + len(self.draft)


@dataclass(slots=True)
class Batch:
    """One step: run the scheduled tokens, copy blocks that forked, then draw a token for each of `draws`.

    `draws` pairs a request with the scheduled tokens whose last position gives its logits: its own, or its leader's.
    Where these have a draft of k tokens, the last 1 + k positions do: as many tokens are drawn as the draft has right,
    and one more.
    """

    scheduled: list[ScheduledTokens] = field(default_factory=list)
    draws: list[tuple[Request, int]] = field(default_factory=list)
    scored: list[Request] = field(default_factory=list)  # end with this step, for they draw nothing
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from block, to block), after the forward
    num_tokens: int = 0
    planned: float = 0.0  # when, on the clock of the caller that passes `now` in
    num_prefill_tokens: int = 0  # of num_tokens, those of requests that run more than one

    def add(self, part: ScheduledTokens) -> None:
        self.scheduled.append(part)
        self.num_tokens += part.count
        self.num_prefill_tokens += 0 if part.is_decode else part.count

    def add_draft(self, index: int, token_ids: tuple[int, ...], drafter: str) -> None:
        """Let scheduled part `index`, which is a decode, verify these tokens too."""
        part = self.scheduled[index]
        count = part.count + len(token_ids)
        self.scheduled[index] = replace(part, count=count, draft=token_ids, drafter=drafter)
        self.num_tokens += len(token_ids)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a step.

    `prefill_chunk` bounds the prompt tokens of a step in which others decode; `step_costs` takes fewer where they
    would slow the running streams down, by `target_inter_token_latency` or by its own measure.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_chunk: int
    max_model_len: int
    target_inter_token_latency: float | None = None  # seconds
    # of max_num_seqs, those that may run however slow a step is; None: all
    num_seqs_at_any_pace: int | None = None
    attention: tuple[AttentionCost, ...] = ()  # of the model, by which a prompt's later tokens take longer
