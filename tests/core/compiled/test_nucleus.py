"""A wide nucleus is found exactly, whether the sample that tells where to look was right or not."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from myserve.core.compiled import nucleus
from myserve.core.compiled.row_reductions import largest_score, weigh
from myserve.core.numerics import MASS_ONE

Row = npt.NDArray[np.float32]
V = 20_011  # no whole number of blocks


def gaussian(spread: float, seed: int = 0) -> Row:
    return (np.random.default_rng(seed).standard_normal(V) * spread).astype(np.float32)


def sampled_are_others() -> Row:
    """The scores that the sample sees lie ten below all others."""
    row = gaussian(1.0)
    row[:: nucleus.SAMPLED] -= 10
    return row


def half_masked() -> Row:
    row = gaussian(2.0)
    row[::2] = -np.inf
    return row


ROWS = {
    "flat": gaussian(0.01),
    "usual": gaussian(2.5),
    "steep": gaussian(8.0),
    "equal": np.zeros(V, np.float32),
    "ties": np.round(gaussian(2.0)),
    "masked": half_masked(),
    "misleading": sampled_are_others(),
}
PS = [0.05, 0.3, 0.7, 0.9, 0.95, 0.999, 0.999999]


def weighed(row: Row) -> tuple[np.float32, Row, int]:
    weights, largest = np.empty_like(row), np.float32(largest_score(row))
    return largest, weights, int(weigh(row, largest, weights))


def edge_by_definition(row: Row, weights: Row, needed: int) -> tuple[float, int]:
    """Sort all; the lowest score of the shortest head that has the mass, and how many of that score are in it."""
    order = np.argsort(-row, kind="stable")
    masses = (weights[order].astype(np.float64) * MASS_ONE).astype(np.int64).cumsum()
    last = int(np.searchsorted(masses, needed))
    edge = row[order[last]]
    return float(edge), int((row[order[: last + 1]] == edge).sum())


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("name", ROWS)
def test_the_edge_is_that_of_the_definition(name: str, p: float) -> None:
    row = ROWS[name]
    largest, weights, total = weighed(row)
    needed = max(math.ceil(p * total), 1)
    spare = np.empty((nucleus.SPARE_ROWS, V), np.float32)
    found = nucleus.wide_nucleus_edge(row, weights, largest, np.int64(total), np.int64(needed), spare)
    assert found == edge_by_definition(row, weights, needed)


def is_guessed(row: Row, p: float) -> bool:
    """Whether the edge lies where the sample says."""
    largest, weights, total = weighed(row)
    needed = math.ceil(p * total)
    low, high = nucleus.guess_edge(row, weights, largest, np.int64(total - needed))
    return bool(low <= edge_by_definition(row, weights, needed)[0] < high)


def test_the_sample_is_right_for_usual_rows_and_wrong_where_it_is_misled() -> None:
    """So the test above takes both ways."""
    assert all(is_guessed(gaussian(2.5, seed), 0.95) for seed in range(10))
    assert not is_guessed(ROWS["misleading"], 0.95)
