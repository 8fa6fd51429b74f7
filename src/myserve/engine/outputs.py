"""What the engine gives back: plain frozen values, no tensors, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class KeptSet:
    """The support of the draw: its ids, its mass under softmax(z/T), and that distribution's entropy in nats."""

    token_ids: tuple[int, ...]
    mass: float
    entropy: float


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sampled token with every number that belongs to it.

    >>> TokenOutput(token_id=7, logprob=-0.5, sampling_logprob=-0.25).top_logprobs
    ()
    """

    token_id: int
    logprob: float  # log-softmax of the raw logits
    sampling_logprob: float  # log of the distribution that the draw used
    top_logprobs: tuple[
        tuple[int, float], ...
    ] = ()  # (id, logprob), best first, raw or processed by logprobs_mode
    token_id_logprobs: tuple[tuple[int, float | None], ...] = ()  # for logprob_token_ids
    kept: KeptSet | None = None
    weight_version: int = 0
    recomputed: bool = False  # everything before it was run again by this version: it had been preempted
    # unix seconds at which the step that made it ended
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """The logprob of one prompt token given the tokens before it."""

    token_id: int
    logprob: float | None  # None at position 0
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Durations in seconds, counts in tokens; measured by the engine's own clock."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_queue_duration: float = 0.0
    prefill_duration: float = 0.0
    generation_queue_duration: float = 0.0
    generation_duration: float = 0.0
    time_to_first_token: float = 0.0
    num_concurrent_requests: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained since the last event: text that can no longer change, and its tokens, aligned.

    A token whose text is held back (an unfinished UTF-8 character, a possible stop string) comes with the
    delta that releases it. `finish_reason` is set on the last delta of a choice and only there.

    `tokens` are the tokens of `text`. `stop_tokens` are the ones that ended the completion and have no text in it:
    the EOS or stop id, or what spelled a stop string. They were sampled, so `tokens + stop_tokens` over all deltas
    is the completion as the policy drew it, and what `usage` counts; a token that a stop string cuts in two stands
    in `tokens`, for a part of its text is in `text`.
    """

    index: int
    text: str = ""
    tokens: tuple[TokenOutput, ...] = ()
    stop_tokens: tuple[TokenOutput, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = (
        None  # the stop id or the stop string that matched; None for EOS or length
    )
    error: Exception | None = None  # with finish_reason "error"
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None  # on the first delta of choice 0, when asked for
    metrics: RequestMetrics | None = None  # with finish_reason
