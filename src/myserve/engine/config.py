"""Each option of the engine is declared here, once, with a default that is right for most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from myserve.engine.drafting.drafts import MOST_DRAFTED
from myserve.errors import RequestError
from myserve.options import check_options, option

__all__ = ["DTYPES", "MOST_SEQS", "NUM_SEQS_AT_ANY_PACE", "EngineConfig"]

NUM_SEQS_AT_ANY_PACE, MOST_SEQS = 64, 256
DTYPES = ("auto", "float32", "bfloat16", "float16")

_MODEL, _BATCH, _CACHE = "Engine", "Batching", "KV cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Hold the options of loading a model and of sharing it. Raises RequestError for what is out of range.

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
    self_test: Literal["kept", "always"] = option(
        "kept",
        "The check that a request's tokens do not depend on its batch. kept: once for the same weights, options, code "
        "and CPU; a later start takes its result and says so. always: at every start, as on GPUs.",
        group=_MODEL,
    )
    quantize: Literal["off", "int8"] = option(
        "off",
        "int8: linear layers, experts and the output layer compute with 8-bit weights and activations, exactly: half "
        "the memory, and tokens in 0.6 of the time. On CPUs. A checkpoint of `myserve quantize` says so itself.",
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

    max_num_seqs: int | None = option(
        None,
        "Choices that run side by side.",
        group=_BATCH,
        unset=f"{NUM_SEQS_AT_ANY_PACE}, and up to {MOST_SEQS} while each has at least four tokens a second and the KV "
        "cache has room for all of them to their ends",
        at_least=1,
    )
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
        unset="three times a stream's own pace, or what leaves prompts nine tenths of their speed; at most 0.25, or "
        "twice a stream's own pace",
        above=0,
    )
    speculation: str = option(
        "auto",
        "Drafted tokens that a step verifies for each running choice, which changes none that is drawn. auto: as many "
        "as pay, by what rows cost and how often drafts are right.",
        group=_BATCH,
        choices=("auto", "off", *map(str, range(1, MOST_DRAFTED + 1))),
    )
    draft_model: str | None = option(
        None,
        "A smaller model of the same vocabulary, a folder or hub id, that drafts what n-grams do not.",
        group=_BATCH,
        unset="none: n-grams alone draft",
    )
    max_queue: int = option(4096, "Choices that may wait or run before a 429.", group=_BATCH, at_least=1)

    kv_cache_bytes: int | None = option(
        None,
        "Memory of the KV cache.",
        group=_CACHE,
        unset="kv_cache_share of what is free; on a CPU at most 4 GiB, or one full context where that is more; and at "
        "most what 64 full contexts use, or max_num_seqs of them",
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
        for name, needs_drafts in (
            (f"speculation={self.speculation}", self.speculation not in ("auto", "off")),
            ("draft_model", self.draft_model is not None),
        ):
            if needs_drafts and self.exact == "off":
                raise RequestError(
                    f"{name} cannot be had with exact=off: without batch-invariant numbers a draft would change "
                    "what is drawn; leave one of them out",
                    param=name.partition("=")[0],
                )
        if self.draft_model is not None and self.speculation == "off":
            raise RequestError(
                "draft_model cannot be had with speculation=off; leave one of them out", param="draft_model"
            )
        if self.quantize != "off" and self.exact == "off":
            raise RequestError(
                "quantize computes by the batch-invariant kernels alone: leave exact on, or quantize off",
                param="quantize",
            )
        if self.max_num_seqs is not None and self.max_num_batched_tokens <= self.max_num_seqs:
            raise RequestError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must exceed max_num_seqs "
                f"({self.max_num_seqs}), or a prompt could wait for ever behind requests that decode",
                param="max_num_batched_tokens",
            )

    @property
    def most_seqs(self) -> int:
        """Choices that run side by side at most; fewer than a step's tokens, or a prompt could wait for ever.

        >>> EngineConfig().most_seqs, EngineConfig(max_num_batched_tokens=100).most_seqs
        (256, 99)
        """
        return self.max_num_seqs or min(MOST_SEQS, self.max_num_batched_tokens - 1)
