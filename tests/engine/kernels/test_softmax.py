"""A partition's weights, running maximum and sums against softmax in float64; what is not visible weighs exactly 0."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numba import njit

from myserve.engine.kernels.lanes import BFLOAT16_BY_LANES, FLOAT32, LANES, PARTITION
from myserve.engine.kernels.softmax import softmax_step


@njit(error_model="numpy")
def _step(
    kind: Any, scores: int, weights: int, first: int, last: int, scale: float, cap: float, state: int
) -> None:
    # state: peak, alpha, then 16 sums from the second cache line on
    softmax_step(
        kind, scores, weights, first, last, np.float32(scale), np.float32(cap), state, state + 4, state + 64
    )


class Row:
    """The softmax of one query row, partition by partition."""

    def __init__(self, kind: Any = FLOAT32) -> None:
        self.kind = kind
        self.state = np.zeros(32, np.float32)
        self.state[0] = -np.inf

    def step(
        self,
        scores: np.ndarray[Any, Any],
        first: int = 0,
        last: int = PARTITION,
        scale: float = 1.0,
        cap: float = 0.0,
    ) -> np.ndarray[Any, Any]:
        scores, weights = scores.astype(np.float32), np.full(PARTITION, np.nan, np.float32)
        _step(
            self.kind,
            scores.ctypes.data,
            weights.ctypes.data,
            first,
            last,
            scale,
            cap,
            self.state.ctypes.data,
        )
        return weights

    @property
    def total(self) -> float:
        return float(self.state[16 : 16 + LANES].sum(dtype=np.float64))

    @property
    def alpha(self) -> float:
        return float(self.state[1])


def scores_of(seed: int, spread: float = 5.0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, spread, PARTITION)


@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16_BY_LANES])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.125, 0.0), (0.5, 5.0)])
def test_two_partitions_are_one_softmax(kind: Any, scale: float, cap: float) -> None:
    row, parts = Row(kind), [scores_of(0), scores_of(1, 9.0)]
    first, second = (row.step(scores, scale=scale, cap=cap) for scores in parts)
    expected = np.concatenate(parts).astype(np.float32).astype(np.float64) * scale
    if cap:
        expected = cap * np.tanh(expected / cap)
    expected = np.exp(expected - expected.max())
    found = np.concatenate([first * row.alpha, second])
    assert np.allclose(found, expected, rtol=2e-6, atol=1e-12)
    assert math.isclose(row.total, expected.sum(), rel_tol=2e-6)


def test_keys_outside_the_window_weigh_exactly_nothing() -> None:
    row, scores = Row(), scores_of(2)
    weights = row.step(scores, first=5, last=40)
    assert not weights[:5].any() and not weights[40:].any()
    assert weights[5:40].max() == 1.0 and (weights[5:40] > 0).all()


def test_what_lies_behind_the_last_key_does_not_show_in_any_bit() -> None:
    """Memory there holds another request's past; it may be NaN."""
    clean, soiled = scores_of(3), scores_of(3)
    soiled[40:] = np.nan
    rows = Row(), Row()
    weights = [row.step(scores, last=40) for row, scores in zip(rows, (clean, soiled), strict=True)]
    assert weights[0].tobytes() == weights[1].tobytes()
    assert rows[0].state.tobytes() == rows[1].state.tobytes()


def test_a_partition_without_a_visible_key_changes_nothing() -> None:
    row = Row()
    row.step(scores_of(4))
    before = row.state.copy()
    assert not row.step(scores_of(5, 50.0), first=10, last=10).any()
    assert row.alpha == 1.0
    assert row.state[0] == before[0] and row.state[16:].tobytes() == before[16:].tobytes()


def test_a_nan_of_the_models_own_is_not_hidden() -> None:
    row, scores = Row(), scores_of(6)
    scores[7] = np.nan
    row.step(scores)
    assert math.isnan(row.total)
