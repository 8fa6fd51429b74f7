"""Completions as columns: flat arrays with offsets, as trainers and data frames take them. Needs numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from myserve.sdk.records.routing import aligned_routing
from myserve.sdk.types import SampledCompletion

if TYPE_CHECKING:
    import numpy as np

__all__ = ["to_columns"]


def to_columns(completions: Sequence[SampledCompletion]) -> dict[str, np.ndarray[Any, Any]]:
    """Return arrays by name. B completions with T tokens in all.

    `tokens` [T] int32 and `offsets` [B+1] int64: completion i has `tokens[offsets[i]:offsets[i+1]]`, of which the
    first `prompt_len[i]` are its prompt. `logprobs` and `sampling_logprobs` [T] float64 are aligned with
    `tokens`, NaN where there is none. Then `prompt_len`, `index` [B] int64, `seed` [B] uint64, `finish_reason`
    and `text` [B]. With routing in every completion, `routing` [T, layers, experts] int32 as `aligned_routing` has it.

    >>> sample = SampledCompletion(text="4", full_tokens=[1, 2, 4], prompt_len=2, finish_reason="stop",
    ...     completion_len=1, inference_logprobs=[-0.5])
    >>> columns = to_columns([sample, sample])
    >>> columns["offsets"].tolist(), columns["logprobs"].tolist()[:3]
    ([0, 3, 6], [nan, nan, -0.5])
    """
    import numpy as np

    lengths = [len(c.full_tokens) for c in completions]
    has_routing = bool(completions) and all(c.routing_matrices is not None for c in completions)
    return {
        "tokens": np.fromiter(_flat(c.full_tokens for c in completions), np.int32, sum(lengths)),
        "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        "logprobs": _aligned([c.inference_logprobs for c in completions], lengths),
        "sampling_logprobs": _aligned([c.sampling_logprobs for c in completions], lengths),
        "prompt_len": np.array([c.prompt_len for c in completions], np.int64),
        "index": np.array([c.index for c in completions], np.int64),
        "seed": np.array([c.seed or 0 for c in completions], np.uint64),
        "finish_reason": np.array([c.finish_reason for c in completions], np.str_),
        "text": np.array([c.text for c in completions], np.object_),
        **({"routing": np.concatenate([aligned_routing(c) for c in completions])} if has_routing else {}),
    }


def _aligned(rows: list[list[float] | None], lengths: list[int]) -> np.ndarray[Any, Any]:
    """Return [T]: rows of C or P+C-1 numbers, each at the end of its completion's tokens, NaN elsewhere."""
    import numpy as np

    flat = np.full(sum(lengths), np.nan)
    end = 0
    for row, length in zip(rows, lengths, strict=True):
        end += length
        if row:
            flat[end - len(row) : end] = row
    return flat


def _flat(rows: Iterable[list[int]]) -> Iterable[int]:
    for row in rows:
        yield from row
