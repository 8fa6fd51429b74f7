"""The engine's few knobs. Each has a default that is right for most, and an effect that a test shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from myserve.errors import RequestError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is loaded and how many requests share it.

    >>> EngineConfig(dtype="fp16")
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: dtype must be one of auto, float32, bfloat16, float16, got 'fp16'
    """

    dtype: str = "auto"  # auto: what the checkpoint says
    device: str = "auto"  # auto: cuda where there is one, else cpu
    trust_remote_code: bool = False  # run Python code that comes with the checkpoint
    exact: Literal["on", "off"] = "on"  # off: faster by a few per cent, and numbers depend on the batch
    threads: int | None = None  # torch's intra-op threads; None: as torch chooses

    max_num_seqs: int = 64  # requests that run side by side
    max_num_batched_tokens: int = 512  # tokens of one step
    prefill_chunk: int = 256  # of those, prompt tokens while other requests decode and fewer wait
    max_queue: int = 4096  # choices that may wait or run before submit raises OverloadedError
    max_model_len: int | None = None  # None: what the model's config says, as far as the KV cache holds it

    num_blocks: int | None = None  # of the KV cache; None: from kv_cache_bytes
    kv_cache_bytes: int | None = None  # None: a quarter of what is free, at most what max_num_seqs can use
    prefix_caching: bool = True
    share_prefix_cache: bool = (
        False  # between clients (key owners): one could then time what another has asked
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RequestError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}", param="dtype")
        if self.exact not in ("on", "off"):
            raise RequestError(f"exact must be 'on' or 'off', got {self.exact!r}", param="exact")
        for name in ("max_num_seqs", "prefill_chunk", "max_queue"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, got {getattr(self, name)}", param=name)
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise RequestError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must exceed max_num_seqs "
                f"({self.max_num_seqs}), or a prompt could wait for ever behind those who decode",
                param="max_num_batched_tokens",
            )
