"""The parts that answers in all dialects share: usage, metrics, our fields beside OpenAI's."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, TypeVar

from myserve.engine.outputs import Delta, TokenOutput
from myserve.errors import EngineError
from myserve.server.answers.arrays import token_arrays
from myserve.server.answers.logprobs import TokenWriter, as_base64
from myserve.server.choice import Choice
from myserve.server.models.models import ServedModel
from myserve.server.prompts.codec import Tokenizing
from myserve.server.prompts.sampling import top_logprobs_of
from myserve.server.sessions.call import SessionCall
from myserve.wire.chat import ChatMessage
from myserve.wire.fields import GenerationRequest
from myserve.wire.perf_metrics import PerfMetrics
from myserve.wire.responses import ChoiceExtras, FinishReason, Usage

__all__ = ["ActiveAnswer", "UsageSoFar", "finish_reason_of", "usage_of", "weight_version_spans"]

R = TypeVar("R", bound=GenerationRequest)


@dataclass(slots=True)
class ActiveAnswer(Generic[R]):
    """One request while it is answered: what it asked for, of which model, and the facts that every chunk repeats."""

    request: R
    model: ServedModel
    id: str
    tokenizing: Tokenizing
    tokens: TokenWriter
    adapter: str | None = None  # that `request.model` names
    session: SessionCall | None = None  # that the request names
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(
        cls, request: R, model: ServedModel, answer_id: str, adapter: str | None = None
    ) -> ActiveAnswer[R]:
        """Start the clock; nothing is asked of the engine yet."""
        tokens = TokenWriter(
            model.codec.token_bytes,
            skip_special_tokens=request.skip_special_tokens is not False,
            as_ids=bool(request.return_tokens_as_token_ids),
            mask_name="kept" if request.kept else "sampling_mask",
            routing_shape=model.engine.routing_shape,
        )
        return cls(request, model, answer_id, Tokenizing(model.tokenizer_thread), tokens, adapter)

    def keep(self, choice: Choice, said: Callable[[Choice], ChatMessage | None]) -> None:
        """Keep a choice that has ended in the request's session, if it names one; before the choice is written."""
        if self.session is not None:
            self.session.add(choice, said(choice))

    @property
    def fingerprint(self) -> str:
        """Return the `system_fingerprint`: the model's, and the adapter's version."""
        loaded = None if self.adapter is None else self.model.engine.adapters.get(self.adapter)
        return self.model.fingerprint + ("" if loaded is None else f"_{loaded.version}")

    @property
    def returns_ids(self) -> bool:
        """Return whether every sampled token is listed, the one that ended it too, so that ids and logprobs align."""
        asked = self.request
        return bool(asked.return_token_ids or asked.raw_output or asked.include_routing_matrix)

    def perf_metrics(self, choices: Sequence[Choice]) -> PerfMetrics:
        """Return the request's costs; of several choices the slowest one's durations."""
        each = [choice.metrics for choice in choices]
        return PerfMetrics(
            prompt_tokens=_prompt_tokens(choices),
            cached_prompt_tokens=_cached_tokens(choices),
            server_time_to_first_token=max(one.time_to_first_token for one in each),
            server_processing_time=time.perf_counter() - self.began,
            num_concurrent_requests=max(one.num_concurrent_requests for one in each),
            prefill_queue_duration=max(one.prefill_queue_duration for one in each),
            prefill_duration=max(one.prefill_duration for one in each),
            generation_queue_duration=max(one.generation_queue_duration for one in each),
            generation_duration=max(one.generation_duration for one in each),
            tokenizer_queue_duration=self.tokenizing.queued,
            tokenizer_duration=self.tokenizing.spent,
            kv_cache_usage=max(one.kv_cache_usage for one in each),
            speculation_generated_tokens=sum(one.num_draft_tokens for one in each),
            speculation_accepted_tokens=sum(one.num_accepted_tokens for one in each),
            backend_host=_host(),
            deployment=self.request.model,
        )

    def extras(
        self,
        choice: Choice,
        tokens: Sequence[TokenOutput],
        *,
        first: bool,
        last: bool,
        echoed: Sequence[int] = (),
    ) -> ChoiceExtras:
        """Return our fields of a chunk that has these tokens. A whole choice is its first chunk and its last.

        `echoed` are the prompt's ids that the answer begins with.
        """
        # vLLM's users read these fields without asking whether they are there; a stream's chunks leave them out
        unasked: ChoiceExtras = {"token_ids": None, "prompt_token_ids": None, "prompt_logprobs": None}
        return {
            **(unasked if first and last else {}),
            **(self._first_extras(choice) if first else {}),
            **self._token_extras(choice, tokens, echoed if first else ()),
            **(self._last_extras(choice, echoed) if last else {}),
        }

    def _first_extras(self, choice: Choice) -> ChoiceExtras:
        """Return what is known before the first token; a stream has it at once, so that a cut one can be resumed."""
        extras: ChoiceExtras = {"seed": choice.seed}
        if self.request.return_token_ids:
            extras["prompt_token_ids"] = list(choice.prompt_token_ids)
        asked = self.request.prompt_logprobs
        if asked is not None and choice.prompt_logprobs is not None:
            extras["prompt_logprobs"] = [
                self.tokens.prompt_ranks(token, asked) for token in choice.prompt_logprobs
            ]
        shape = self.model.engine.routing_shape
        if self.request.include_routing_matrix and shape is not None:
            extras["routing_matrix_shape"] = [shape.num_moe_layers, shape.experts_per_token]
            if asked is not None and choice.prompt_logprobs is not None:
                matrices = [token.routed_experts for token in choice.prompt_logprobs]
                extras["prompt_routing_matrices"] = [
                    None if raw is None else as_base64(raw) for raw in matrices
                ]
        return extras

    def _token_extras(
        self, choice: Choice, tokens: Sequence[TokenOutput], echoed: Sequence[int]
    ) -> ChoiceExtras:
        extras: ChoiceExtras = {}
        if self.request.return_token_ids:
            extras["token_ids"] = [token.token_id for token in tokens]
            extras.update(_versions_so_far(choice, tokens))
        if self.request.return_drafters:
            extras["drafters"] = [token.drafter for token in tokens]
        if self.request.token_arrays:
            scored = (choice.prompt_logprobs or ())[-len(echoed) :] if echoed else ()
            extras["token_arrays"] = token_arrays(scored, tokens, top_logprobs_of(self.request))
        return extras

    def _last_extras(self, choice: Choice, echoed: Sequence[int]) -> ChoiceExtras:
        assert choice.last is not None, "asked only of a choice that has ended"
        spans = weight_version_spans(choice.sampled)
        extras: ChoiceExtras = {
            "stop_reason": choice.last.stop_reason,
            "seed": choice.seed,
            "weight_version": self.model.engine.weight_version
            if choice.weight_version is None
            else choice.weight_version,
        }
        if choice.adapter_version is not None:
            extras["adapter_version"] = choice.adapter_version
        if len(spans) > 1:
            extras["weight_version_spans"] = spans
        if replica_class := choice.metrics.replica_class:
            extras["replica_class"] = replica_class
        if self.session is not None:
            extras["session"] = self.session.told(choice)
        if self.request.raw_output:
            extras["raw_output"] = {
                "prompt_token_ids": list(choice.prompt_token_ids),
                "completion_token_ids": [*echoed, *(token.token_id for token in choice.sampled)],
            }
        return extras


def _versions_so_far(choice: Choice, tokens: Sequence[TokenOutput]) -> ChoiceExtras:
    """Return which weights made a chunk's tokens: a cut stream is resumed, perhaps by others, so every chunk has it."""
    if not tokens:
        return {}
    last = _made_by(tokens[-1])
    extras: ChoiceExtras = {"weight_version": tokens[-1].weight_version}
    if (adapter_version := tokens[-1].adapter_version) is not None:
        extras["adapter_version"] = adapter_version
    if any(_made_by(token) != last or token.recomputed for token in tokens):
        extras["weight_version_spans"] = weight_version_spans(choice.sampled)
    return extras


def _made_by(token: TokenOutput) -> dict[str, int]:
    """Return the versions that made a token."""
    made = {"weight_version": token.weight_version}
    return made if token.adapter_version is None else made | {"adapter_version": token.adapter_version}


def usage_of(choices: Sequence[Choice]) -> Usage:
    """Count every prompt once, however many choices it has, and every sampled token, the last ones too."""
    sampled = sum(len(choice.tokens) + len(choice.stop_tokens) for choice in choices)
    return _usage(_prompt_tokens(choices), sampled, _cached_tokens(choices))


class UsageSoFar:
    """Counts what `usage_of` does, as deltas come: it is on every chunk, and there may be thousands of choices."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._prompt_tokens = _prompt_tokens(choices)
        self._leaders = {choice.index for choice in _by_prompt(choices).values()}
        self._sampled = self._cached = 0

    def add(self, choice: Choice, delta: Delta) -> Usage:
        """Take in what `choice` gained, and has already; return the usage up to it."""
        self._sampled += len(delta.tokens) + len(delta.stop_tokens)
        if delta.finish_reason is not None and choice.index in self._leaders:
            self._cached += choice.metrics.cached_tokens
        return _usage(self._prompt_tokens, self._sampled, self._cached)


def _usage(prompt: int, sampled: int, cached: int) -> Usage:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_reason_of(choice: Choice, *, has_called: bool = False) -> FinishReason:
    reason = choice.last and choice.last.finish_reason
    if reason not in ("stop", "length", "abort"):
        raise EngineError(f"a choice ended with {reason!r}")
    if has_called and reason == "stop":
        return "tool_calls"
    return reason


def weight_version_spans(tokens: Sequence[TokenOutput]) -> list[dict[str, int]]:
    """Return the runs of tokens that one version of the weights (and of the adapter) made, as half-open intervals.

    The keys and values of a run were made with it, those before stayed as they were; in a run that says `recomputed`,
    all before it were made anew by its version (the request had been preempted).

    >>> made = [TokenOutput(1, 0.0, 0.0, weight_version=version) for version in (3, 3, 4)]
    >>> weight_version_spans(made)
    [{'start': 0, 'end': 2, 'weight_version': 3}, {'start': 2, 'end': 3, 'weight_version': 4}]
    """
    spans: list[dict[str, int]] = []
    last: dict[str, int] = {}
    for position, token in enumerate(tokens):
        if (made := _made_by(token)) != last or token.recomputed:
            last = made
            spans.append({"start": position, "end": position, **made})
            if token.recomputed:
                spans[-1]["recomputed"] = True
        spans[-1]["end"] = position + 1
    return spans


def _by_prompt(choices: Sequence[Choice]) -> Mapping[int, Choice]:
    """Return the first choice of each prompt."""
    return {choice.prompt: choice for choice in reversed(choices)}


def _prompt_tokens(choices: Sequence[Choice]) -> int:
    return sum(len(choice.prompt_token_ids) for choice in _by_prompt(choices).values())


def _cached_tokens(choices: Sequence[Choice]) -> int:
    return sum(choice.metrics.cached_tokens for choice in _by_prompt(choices).values())


@lru_cache(maxsize=1)
def _host() -> str:
    return socket.gethostname()
