"""The compiled draw (`kernels`) for the rows that it knows, over as many threads as torch has."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from myserve.core.numerics import MASS_ONE
from myserve.core.rows import RowState

SMALLEST_NORMAL = 2.0**-126
ROWS_A_THREAD = 1 << 18  # scores that are worth waking another thread for


class Drawn(NamedTuple):
    """What the compiled draw gives, a row each: Python lists."""

    tokens: list[int]  # -1: nothing to draw; the maxima say why
    raw_largest: list[float]
    largest: list[float]
    raw_score: list[float]  # of the token, before stage 1
    score: list[float]  # of the token, under the behaviour distribution
    raw_mass: list[int]  # quanta
    mass: list[int]


@cache
def available() -> bool:
    """Whether Numba is installed."""
    return find_spec("numba") is not None


def knows(row: RowState) -> bool:
    """Whether the compiled draw covers everything that the row asks for."""
    p = row.params
    processed = p.logprobs_mode == "processed" and (p.top_logprobs > 0 or bool(p.logprob_token_ids))
    truncated = p.typical_p < 1.0 or p.top_n_sigma is not None
    return row.torch_noise is None and not (processed or truncated or p.kept)


def draw(raw: Tensor, edited: Tensor, rows: Sequence[RowState]) -> Drawn:
    """Draw every row of CPU float32 `edited` [B, V], the raw scores after stages 1 to 4."""
    from myserve.core import kernels  # compiles, or loads what was compiled: on first use, not at import

    B = len(rows)
    numbers = torch.tensor([_numbers(row) for row in rows], dtype=torch.float64).numpy()
    top_k = torch.tensor([row.params.top_k or 0 for row in rows]).numpy()
    keys = torch.tensor([row.counter_key for row in rows], dtype=torch.int64).view(torch.uint64).numpy()
    tokens = torch.empty(B, dtype=torch.int64)
    floats = torch.empty(B, 4)
    masses = torch.full((B, 2), int(MASS_ONE))  # a row without a draw leaves its own as it is
    arrays = (
        raw.numpy(),
        edited.numpy(),
        numbers,
        top_k,
        keys,
        tokens.numpy(),
        floats.numpy(),
        masses.numpy(),
    )
    parts = max(1, min(torch.get_num_threads(), B, raw.numel() // ROWS_A_THREAD))
    edges = [B * part // parts for part in range(parts + 1)]
    others = [_pool().submit(kernels.draw_rows, a, b, *arrays) for a, b in pairwise(edges[1:])]
    kernels.draw_rows(0, edges[1], *arrays)
    for other in others:
        other.result()
    return Drawn(tokens.tolist(), *floats.T.tolist(), *masses.T.tolist())


def _numbers(row: RowState) -> tuple[float, float, float, float]:
    p = row.params
    temperature = max(p.temperature, SMALLEST_NORMAL) if p.temperature else 0.0
    return temperature, p.top_p, p.min_p, float(row.edits_scores)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        max_workers=max(1, torch.get_num_threads() - 1), thread_name_prefix="myserve-sampler"
    )
