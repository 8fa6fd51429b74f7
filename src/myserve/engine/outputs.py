"""The engine's answers: plain frozen values, no tensors, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from myserve.core.waterfall import Waterfall

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Delta",
    "FinishReason",
    "KeptSet",
    "PromptLogprob",
    "RequestMetrics",
    "RoutingShape",
    "TokenOutput",
]

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class KeptSet:
    """The support of the draw: its ids, its mass under softmax(z/T), and that distribution's entropy in nats."""

    token_ids: tuple[int, ...]
    mass: float
    entropy: float


# a Struct, as `Delta`: one of each is made for every token, in 0.2 µs where a frozen dataclass takes 2; no garbage
# collector need see it, for nothing in it can refer back
class TokenOutput(Struct, frozen=True, gc=False):
    """One sampled token with every number that belongs to it.

    >>> TokenOutput(token_id=7, logprob=-0.5, sampling_logprob=-0.25).top_logprobs
    ()
    """

    token_id: int
    logprob: float  # log-softmax of the raw logits
    sampling_logprob: float  # log of the distribution that the draw used
    # (id, logprob), best first, raw or processed by logprobs_mode
    top_logprobs: tuple[tuple[int, float], ...] = ()
    token_id_logprobs: tuple[tuple[int, float | None], ...] = ()  # for logprob_token_ids
    kept: KeptSet | None = None
    routed_experts: bytes | None = None  # of the forward pass that gave it: `RoutingShape.array` reads it
    weight_version: int = 0
    adapter_version: int | None = None  # of its request's adapter; None: it has none
    recomputed: bool = False  # everything before it was run again by this version: it had been preempted
    # unix seconds at which the step that made it ended
    time: float = 0.0
    # what it adds to this text, where that depends on its place; None: its bytes of the vocabulary
    text_bytes: bytes | None = None
    rank: int | None = None  # among all ids, 1 the likeliest; None where it was not asked for
    entropy: float | None = None  # nats, of the raw logits; None where it was not asked for
    waterfall: Waterfall | None = None  # of the one token that it was asked for
    drafter: str | None = None  # that had it before it was drawn; None: it was drawn without a draft


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """The form of a token's routing: expert ids [num_moe_layers, experts_per_token], each row best first.

    As bytes they are uint8, or little-endian uint16 where a layer has more than 256 experts.

    >>> shape = RoutingShape(num_moe_layers=2, experts_per_token=2, num_experts=8)
    >>> shape.dtype, shape.array([bytes([3, 1, 0, 7])]).tolist()
    ('uint8', [[[3, 1], [0, 7]]])
    """

    num_moe_layers: int
    experts_per_token: int
    num_experts: int

    @property
    def dtype(self) -> Literal["uint8", "uint16"]:
        return "uint8" if self.num_experts <= 256 else "uint16"

    @property
    def numpy_dtype(self) -> str:
        return "<u1" if self.dtype == "uint8" else "<u2"

    def array(self, rows: Sequence[bytes]) -> np.ndarray[Any, Any]:
        """Rows as `TokenOutput.routed_experts` has them, as an array [len(rows), num_moe_layers, experts_per_token]."""
        import numpy as np

        flat = np.frombuffer(b"".join(rows), self.numpy_dtype)
        return flat.reshape(len(rows), self.num_moe_layers, self.experts_per_token)


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """The logprob of one prompt token given the tokens before it."""

    token_id: int
    logprob: float | None  # None at position 0
    top_logprobs: tuple[tuple[int, float], ...] = ()
    routed_experts: bytes | None = None  # of the position before it, which gives its logprob
    rank: int | None = None  # among all ids, 1 the likeliest; None at position 0
    token_id_logprobs: tuple[tuple[int, float | None], ...] = ()  # for logprob_token_ids


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Durations in seconds, counts in tokens, usage as a fraction; measured by the engine's own clock."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    arrival_time: float = 0.0  # unix seconds; the durations below follow one another from here on
    prefill_queue_duration: float = 0.0
    prefill_duration: float = 0.0
    generation_queue_duration: float = 0.0
    generation_duration: float = 0.0
    time_to_first_token: float = 0.0
    num_concurrent_requests: int = 0
    kv_cache_usage: float = 0.0  # blocks that running requests hold, just after this one gave back its own
    num_draft_tokens: int = 0  # that were verified
    num_accepted_tokens: int = 0  # of them, those that were drawn
    replica_class: str = ""  # of bits, in a fleet whose replicas have several


class Delta(Struct, frozen=True):
    """The gain of one choice since the last event: text that can no longer change, and its tokens, aligned.

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
    # the stop id or the stop string that matched; None for EOS or length
    stop_reason: int | str | None = None
    error: Exception | None = None  # with finish_reason "error"
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None  # on the first delta of choice 0, when asked for
    metrics: RequestMetrics | None = None  # with finish_reason
