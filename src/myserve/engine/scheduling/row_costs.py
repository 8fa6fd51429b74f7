"""Predicts what a step without prompts costs by its number of rows, from those that ran; pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

__all__ = ["ROW_COUNTS", "RowCosts", "padded_draft_rows"]

# Rows of the recorded steps that verify drafts: what a step has beyond one of these is padding rows.
ROW_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56, 64)

# Relative to one row, before any was seen: measured on a CPU whose weights come from memory. Between them linear.
_FIRST_GUESS = ((1, 1.0), (4, 1.05), (8, 1.2), (16, 1.6), (32, 2.4), (64, 4.0))
_PACE = 0.2  # how fast the level follows: it moves with the contexts, and with what else the machine does
_RATIO_PACE = 0.1
_FORGETTING = 0.998  # of a ratio, a step: what was once found too costly is tried again
_MAX_SURPRISE = 2.0  # a step counts as this many times its estimate at most


class RowCosts:
    """Learns what rows cost on this machine.

    >>> costs = RowCosts()
    >>> costs.relative(8) / costs.relative(1)
    1.2
    >>> for _ in range(80): costs.observe(rows=1, seconds=0.02); costs.observe(rows=8, seconds=0.06)
    >>> round(costs.relative(8) / costs.relative(1), 1)
    3.0
    """

    def __init__(self) -> None:
        self._level: float | None = None  # seconds of one row, by the first guess
        self._ratios: dict[int, float] = {}  # rows -> how much dearer than the first guess

    def relative(self, rows: int) -> float:
        """Return the cost of a step of so many rows, in units that any two numbers of rows share."""
        return _guess(rows) * self._ratio(rows)

    def seconds(self, rows: int) -> float:
        """Return what such a step takes; 0 while none was seen."""
        return 0.0 if self._level is None else self._level * self.relative(rows)

    def observe(self, rows: int, seconds: float) -> None:
        """Take in what a step of so many rows cost, sampling left out: a draw is paid for by its token."""
        if seconds <= 0.0:
            return
        if self._level is None:
            self._level = seconds / self.relative(rows)
        surprise = seconds / (self._level * self.relative(rows))
        surprise = min(_MAX_SURPRISE, max(1.0 / _MAX_SURPRISE, surprise))
        own = self._ratio(rows)
        for count, ratio in self._ratios.items():
            self._ratios[count] = ratio**_FORGETTING
        self._ratios[rows] = own * surprise**_RATIO_PACE
        self._level *= surprise**_PACE

    def _ratio(self, rows: int) -> float:
        """Return the ratio of the nearest number of rows that was seen; 1 where none was."""
        if not self._ratios:
            return 1.0
        return self._ratios[min(self._ratios, key=lambda seen: abs(seen - rows))]


def padded_draft_rows(rows: int) -> int:
    """Return the rows of the recorded step in which so many rows with drafts run; beyond the largest, themselves.

    >>> padded_draft_rows(6), padded_draft_rows(7), padded_draft_rows(99)
    (6, 8, 99)
    """
    place = bisect_left(ROW_COUNTS, rows)
    return ROW_COUNTS[place] if place < len(ROW_COUNTS) else rows


def _guess(rows: int) -> float:
    for (low, cost), (high, next_cost) in pairwise(_FIRST_GUESS):
        if rows <= high:
            return cost + (next_cost - cost) * (rows - low) / (high - low)
    last, cost = _FIRST_GUESS[-1]
    return cost * rows / last
