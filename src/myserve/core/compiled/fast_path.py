"""The compiled draw (`draw_kernel`) for the rows that it knows, over as many threads as torch has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from myserve.core.numerics import MASS_ONE
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState

__all__ = [
    "SCORES_A_THREAD",
    "SMALLEST_NORMAL",
    "CompiledDraw",
    "available",
    "best_tokens",
    "covers",
    "draw",
    "is_alone",
    "knows",
    "mask_",
    "normalise",
    "warm_up",
]

SMALLEST_NORMAL = 2.0**-126
SCORES_A_THREAD = 1 << 18  # scores that are worth waking another thread for


class CompiledDraw(NamedTuple):
    """Hold the results of a compiled draw, one entry a row, as Python lists."""

    tokens: list[int]  # -1: nothing to draw; the maxima say why
    raw_largest: list[float]
    largest: list[float]
    raw_score: list[float]  # of the token, before stage 1
    score: list[float]  # of the token, under the behaviour distribution
    raw_mass: list[int]  # quanta
    mass: list[int]


@cache
def available() -> bool:
    """Return whether Numba is installed."""
    return find_spec("numba") is not None


def warm_up() -> None:
    """Load the compiled code, or compile it (about ten seconds, once an installation), before it is waited for."""
    if available():
        scores = torch.zeros(1, 2, dtype=torch.float32)
        row = RowState(
            SamplingParams(),
            seed=0,
            sample_index=0,
            prompt_token_ids=(),
            vocab_size=2,
            eos_token_ids=(),
        )
        draw(scores, scores, [row])
        normalise(scores)
        best_tokens(scores, [1])
        mask_(scores.clone(), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))


def is_alone(row: RowState) -> bool:
    """Return whether nothing but the compiled draw looks at the row's scores: no stage before, and no report."""
    p = row.params
    reports = p.top_logprobs or p.logprob_token_ids or p.ranks or p.entropies or p.waterfall
    return not (row.edits_scores or reports) and knows(row)


def knows(row: RowState) -> bool:
    """Return whether the compiled draw covers everything that the row asks for."""
    p = row.params
    processed = p.logprobs_mode == "processed" and (p.top_logprobs > 0 or bool(p.logprob_token_ids))
    truncated = p.typical_p < 1.0 or p.top_n_sigma is not None
    return row.torch_noise is None and not (processed or truncated or p.kept)


def covers(scores: Tensor) -> bool:
    """Return whether compiled code can read these scores."""
    return available() and scores.device.type == "cpu" and scores.dtype == torch.float32


def normalise(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return (largest score [R], mass in quanta [R]) of the rows of [R, V]."""
    from myserve.core.compiled import entry_points

    largest, masses = (
        torch.empty(len(scores), dtype=torch.float32),
        torch.empty(len(scores), dtype=torch.int64),
    )
    arrays = (scores.contiguous(), largest, masses)
    _over_threads(entry_points.normalise_rows(), scores.shape, *arrays, work_rows=1)
    return largest, masses


def mask_(scores: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Set the scores that packed masks forbid to -inf, in place, as `stages.mask_` does."""
    from myserve.core.compiled import entry_points

    _over_threads(entry_points.mask_rows(), masks.shape, masks, scores, rows)


def best_tokens(scores: Tensor, k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return (ids, scores) [R, most] of each row's k[r] best, k[r] >= 1, in no order; id -1 where there are fewer."""
    from myserve.core.compiled import entry_points

    most = min(max(k), scores.shape[1])
    ids = torch.full((len(k), most), -1)
    values = torch.empty(len(k), most, dtype=torch.float32)
    arrays = (scores.contiguous(), torch.tensor(k), ids, values)
    _over_threads(entry_points.best_rows(), scores.shape, *arrays, work_rows=1)
    return ids, values


def draw(
    raw: Tensor, edited: Tensor, rows: Sequence[RowState], places: Sequence[int] | None = None
) -> CompiledDraw:
    """Draw every row of CPU float32 `edited` [B, V], the raw scores after stages 1 to 4.

    Where these changed none of them, `raw` may be bfloat16 and `edited` the same tensor: a row is widened where it is
    drawn from, in a core's cache. `places`: where in them each row's scores are; None: in order.
    """
    # compiled, or loaded: on first use, not at import
    from myserve.core.compiled import draw_kernel, entry_points

    B = len(rows)
    numbers = torch.tensor([_numbers(row) for row in rows], dtype=torch.float64)
    top_k = torch.tensor([row.params.top_k or 0 for row in rows])
    keys = torch.tensor([row.counter_key for row in rows], dtype=torch.int64).view(torch.uint64)
    tokens = torch.empty(B, dtype=torch.int64)
    floats = torch.empty(B, 4, dtype=torch.float32)
    masses = torch.full((B, 2), int(MASS_ONE))  # a row without a draw leaves its own as it is
    none = torch.empty(0, raw.shape[1])
    halves, wide = none.to(torch.int16), (raw, edited)
    if raw.dtype == torch.bfloat16:
        halves, wide = raw.view(torch.int16), (none, none)
    at = torch.arange(B) if places is None else torch.tensor(places)
    arrays = (at, halves, *wide, numbers, top_k, keys, tokens, floats, masses)
    _over_threads(entry_points.draw_rows(), (B, raw.shape[1]), *arrays, work_rows=draw_kernel.WORK_ROWS)
    return CompiledDraw(tokens.tolist(), *floats.T.tolist(), *masses.T.tolist())


def _numbers(row: RowState) -> tuple[float, float, float, float]:
    p = row.params
    temperature = max(p.temperature, SMALLEST_NORMAL) if p.temperature else 0.0
    return temperature, p.top_p, p.min_p, float(row.edits_scores)


def _over_threads(
    kernel: Callable[..., None], shape: Sequence[int], *tensors: Tensor, work_rows: int = 0
) -> None:
    """Run `kernel(start, stop, *arrays)` over all rows of scores of this shape, parts of them on other threads.

    `work_rows` more arrays of a row's size, [work_rows, V], are there for a part to work in.
    """
    arrays = [tensor.numpy() for tensor in tensors]
    rows, V = shape
    parts = max(1, min(torch.get_num_threads(), rows, rows * V // SCORES_A_THREAD))
    edges = [rows * part // parts for part in range(parts + 1)]

    def run(start: int, stop: int) -> None:
        kernel(start, stop, *arrays, *([_work(work_rows, V)] if work_rows else []))

    running = [_pool().submit(run, *part) for part in pairwise(edges[1:])]
    run(0, edges[1])
    for part in running:
        part.result()


_kept = threading.local()


def _work(rows: int, V: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Memory [rows, V] of this thread, kept: fresh memory would cost as much as what is computed in it."""
    memory: np.ndarray[Any, np.dtype[np.float32]] | None = getattr(_kept, "memory", None)
    if memory is None or memory.size < rows * V:
        _kept.memory = memory = np.empty(rows * V, np.float32)
    return memory[: rows * V].reshape(rows, V)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        max_workers=max(1, torch.get_num_threads() - 1), thread_name_prefix="myserve-sampler"
    )
