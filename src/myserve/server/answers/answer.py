"""The parts that answers in all dialects share: usage, metrics, our fields beside OpenAI's."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, TypeVar

from myserve.engine.outputs import TokenOutput
from myserve.errors import EngineError
from myserve.server.answers.arrays import token_arrays
from myserve.server.answers.logprobs import TokenWriter, as_base64
from myserve.server.choice import Choice
from myserve.server.models.models import ServedModel
from myserve.server.prompts.codec import Tokenizing
from myserve.server.prompts.sampling import top_logprobs_of
from myserve.wire.fields import GenerationRequest
from myserve.wire.perf_metrics import PerfMetrics
from myserve.wire.responses import ChoiceExtras, FinishReason, Usage

__all__ = ["ActiveAnswer", "finish_reason_of", "usage_of", "weight_version_spans"]

R = TypeVar("R", bound=GenerationRequest)


@dataclass(slots=True)
class ActiveAnswer(Generic[R]):
    """One request while it is answered: what it asked for, of which model, and the facts that every chunk repeats."""

    request: R
    model: ServedModel
    id: str
    tokenizing: Tokenizing
    tokens: TokenWriter
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(cls, request: R, model: ServedModel, answer_id: str) -> ActiveAnswer[R]:
        """Start the clock; nothing is asked of the engine yet."""
        tokens = TokenWriter(
            model.codec.token_bytes,
            skip_special_tokens=request.skip_special_tokens is not False,
            as_ids=bool(request.return_tokens_as_token_ids),
            mask_name="kept" if request.kept else "sampling_mask",
            routing_shape=model.engine.routing_shape,
        )
        return cls(request, model, answer_id, Tokenizing(model.tokenizer_thread), tokens)

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
        return {
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
        if len(spans) > 1:
            extras["weight_version_spans"] = spans
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
    last = tokens[-1].weight_version
    if all(token.weight_version == last and not token.recomputed for token in tokens):
        return {"weight_version": last}
    return {"weight_version": last, "weight_version_spans": weight_version_spans(choice.sampled)}


def usage_of(choices: Sequence[Choice]) -> Usage:
    """Count every prompt once, however many choices it has, and every sampled token, the last ones too."""
    sampled = sum(len(choice.sampled) for choice in choices)
    prompt = _prompt_tokens(choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": _cached_tokens(choices)},
    }


def finish_reason_of(choice: Choice, *, has_called: bool = False) -> FinishReason:
    reason = choice.last and choice.last.finish_reason
    if reason not in ("stop", "length", "abort"):
        raise EngineError(f"a choice ended with {reason!r}")
    if has_called and reason == "stop":
        return "tool_calls"
    return reason


def weight_version_spans(tokens: Sequence[TokenOutput]) -> list[dict[str, int]]:
    """Return the runs of tokens that one version of the weights made, as half-open intervals.

    The keys and values of a run were made with it, those before stayed as they were; in a run that says `recomputed`,
    all before it were made anew by its version (the request had been preempted).

    >>> made = [TokenOutput(1, 0.0, 0.0, weight_version=version) for version in (3, 3, 4)]
    >>> weight_version_spans(made)
    [{'start': 0, 'end': 2, 'weight_version': 3}, {'start': 2, 'end': 3, 'weight_version': 4}]
    """
    spans: list[dict[str, int]] = []
    for position, token in enumerate(tokens):
        if not spans or spans[-1]["weight_version"] != token.weight_version or token.recomputed:
            spans.append({"start": position, "end": position, "weight_version": token.weight_version})
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
