"""The options of a sampling call, each in one place: its meaning, and how it becomes part of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, get_args

from myserve.sdk.request import SampleRequest, as_token_ids
from myserve.sdk.sampling.group import OnError

__all__ = ["Array", "CallPlan", "Messages", "Prompt", "SampleOptions", "TokenIds", "plan"]

Messages = Sequence[Mapping[str, Any]]


class Array(Protocol):
    """A numpy array, a torch tensor, or anything else that becomes lists."""

    def tolist(self) -> Any: ...


TokenIds = (
    Sequence[int] | Array | Mapping[str, Any]
)  # a mapping: a tokenizer's encoding, with its `input_ids`
Prompt = str | Messages | TokenIds  # a text is one user's message


class SampleOptions(TypedDict, total=False):
    """The keyword arguments of every sampling call. Any other goes to the server as it is."""

    n: int  # samples of the prompt; 1
    max_tokens: int  # per sample; 1024
    temperature: float  # 1.0; 0 is greedy
    top_p: float  # 1.0: off
    top_k: int  # 0: off
    stop: str | Sequence[str]
    seed: int | None  # None: of the sampler's run seed, or drawn; a retried sample keeps it
    logprobs: bool  # fills inference_logprobs, and sampling_logprobs where the server knows them
    top_logprobs: int | None  # alternatives beside each token
    echo: bool  # logprobs of the prompt too: P+C-1 rows
    include_routing_matrix: bool  # MoE router replay
    # of the client
    max_seq_len: int | None  # prompts that reach it are not sent; longer samples are dropped, and counted
    on_error: OnError  # "raise" aborts the siblings; "keep" returns what there is; "refill" asks again
    timeout: float | None  # seconds for the whole call, retries included
    # of the server, as they are
    min_p: float
    typical_p: float
    min_tokens: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    logit_bias: Mapping[str, float]
    kept: bool  # the support of each draw, its mass and entropy: `SampledCompletion.kept`
    logprobs_mode: str
    noise: str
    stream_interval: int  # tokens a chunk: less work for both ends, coarser `token_times`
    cache_salt: str
    priority: int
    user: str
    extra: Mapping[str, Any]  # any other field


@dataclass(frozen=True, slots=True)
class CallPlan:
    """A call for one prompt: the request, and what the client does with its samples."""

    request: SampleRequest
    n: int
    max_seq_len: int | None
    on_error: OnError
    timeout: float | None

    @property
    def is_too_long(self) -> bool:
        """Return whether the prompt alone reaches `max_seq_len`: then nothing is asked."""
        return self.max_seq_len is not None and len(self.request.prompt_token_ids) >= self.max_seq_len


_OF_REQUEST = ("max_tokens", "temperature", "top_p", "top_k", "logprobs", "top_logprobs", "echo")


def plan(model: str, prompt_token_ids: TokenIds, seed: int, options: Mapping[str, Any]) -> CallPlan:
    """Return the call that these options ask for. Raises ValueError or TypeError, which name the option.

    >>> plan("m", [1], 7, {"n": 2, "stop": "END", "min_p": 0.1}).request.stop
    ('END',)
    >>> plan("m", [1], 7, {"n": 0})
    Traceback (most recent call last):
    ...
    ValueError: n must be at least 1, got 0
    """
    rest = dict(options)
    rest.pop("seed", None)
    n, on_error = rest.pop("n", 1), rest.pop("on_error", "raise")
    max_seq_len, timeout = rest.pop("max_seq_len", None), rest.pop("timeout", None)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be one of {', '.join(get_args(OnError))}, got {on_error!r}")
    if rest.get("top_logprobs") is not None and not rest.get("logprobs"):
        raise ValueError("top_logprobs needs logprobs=True")
    stop = rest.pop("stop", None) or ()
    fields = {name: rest.pop(name) for name in _OF_REQUEST if name in rest}
    request = SampleRequest(
        prompt_token_ids=tuple(as_token_ids(prompt_token_ids)),
        model=model,
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        include_routing_matrix=rest.pop("include_routing_matrix", False),
        extra={**rest.pop("extra", {}), **rest},
        **fields,
    )
    return CallPlan(request, n, max_seq_len, on_error, timeout)
