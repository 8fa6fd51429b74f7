"""Each option of the engine is declared here, once, with a default that is right for most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from myserve.errors import RequestError
from myserve.options import check_options, option

__all__ = ["DTYPES", "EngineConfig"]

DTYPES = ("auto", "float32", "bfloat16", "float16")

_MODEL, _BATCH, _CACHE = "Engine", "Batching", "KV cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is loaded and how many requests share it. Raises RequestError for what is out of range.

    >>> EngineConfig(dtype="fp16")
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: dtype must be one of auto, float32, bfloat16, float16, got 'fp16'
    """

    dtype: str = option(
        "auto", "The type of weights and activations; auto is the checkpoint's.", group=_MODEL, choices=DTYPES
    )
    device: str = option(
        "auto", "cpu, cuda, cuda:1 …; auto is CUDA where there is one, else the CPU.", group=_MODEL
    )
    trust_remote_code: bool = option(
        False,
        "Run Python code that comes with the checkpoint.",
        group=_MODEL,
        other_variable="TRUST_REMOTE_CODE",
    )
    exact: Literal["on", "off"] = option(
        "on",
        "Batch-invariant numbers. off: the libraries' own kernels, whose numbers depend on the batch; on CPUs they "
        "are also slower (1.8 to 2.9 times, measured).",
        group=_MODEL,
    )
    threads: int | None = option(
        None,
        "Threads of the CPU that compute the model.",
        group=_MODEL,
        unset="as PyTorch chooses",
        at_least=1,
    )
    max_model_len: int | None = option(
        None,
        "Tokens of the longest context, prompt and completion together.",
        group=_MODEL,
        unset="the model's; of LongRoPE, as far as the angles of short texts reach; and what the KV cache holds",
        at_least=1,
    )

    max_num_seqs: int = option(64, "Choices that run side by side.", group=_BATCH, at_least=1)
    max_num_batched_tokens: int = option(
        512, "Tokens of one step; more than max_num_seqs.", group=_BATCH, at_least=2
    )
    prefill_chunk: int = option(
        256,
        "Of a step's tokens, at most those of prompts while other requests decode.",
        group=_BATCH,
        at_least=1,
    )
    target_inter_token_latency: float | None = option(
        None,
        "Seconds between two tokens of a running stream while prompts come in. Shorter steps, slower prompts.",
        group=_BATCH,
        unset="three times a stream's own pace, or what leaves prompts nine tenths of their speed",
        above=0,
    )
    max_queue: int = option(4096, "Choices that may wait or run before a 429.", group=_BATCH, at_least=1)

    kv_cache_bytes: int | None = option(
        None,
        "Memory of the KV cache.",
        group=_CACHE,
        unset="kv_cache_share of what is free, and at most what max_num_seqs full contexts use",
        at_least=1,
        is_bytes=True,
    )
    kv_cache_share: float = option(
        0.25,
        "Share of the free memory that the KV cache takes where kv_cache_bytes does not say how much.",
        group=_CACHE,
        above=0,
        at_most=1,
    )
    num_blocks: int | None = option(
        None, "Blocks of the KV cache.", group=_CACHE, unset="as many as its memory holds", at_least=1
    )
    prefix_caching: bool = option(True, "Keep the KV of prompts seen before.", group=_CACHE)
    share_prefix_cache: bool = option(
        False,
        "Share cached prefixes between the owners of keys. One can then find out, by times and cached_tokens, what "
        "another's prompt began with.",
        group=_CACHE,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise RequestError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must exceed max_num_seqs "
                f"({self.max_num_seqs}), or a prompt could wait for ever behind requests that decode",
                param="max_num_batched_tokens",
            )
