"""Shares a step's rows out among drafts: as many as make tokens a second the most, by expectation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["allot"]


def allot(
    chances: Sequence[Sequence[float]],
    rows: int,
    most_rows: int,
    seconds: Callable[[int], float],
) -> list[int]:
    """Return how many drafted tokens of each request to run.

    `chances[r][j]`: how likely the first j + 1 drafted tokens of request r are all to be drawn, which falls with j.
    `rows`: the step's rows without drafts, each of which gives a token; `most_rows`: with them. `seconds(n)`: what a
    step of n rows takes.

    >>> allot([[0.9, 0.8, 0.1], [0.2]], 2, 64, lambda rows: 1.0 + 0.1 * rows)
    [2, 0]
    >>> allot([[0.9, 0.8, 0.1], [0.2]], 2, 64, lambda rows: float(rows))
    [0, 0]
    """
    # the likeliest rows first; a request's are in order, for a sort keeps the order of equals
    ordered = sorted(
        ((chance, r) for r, own in enumerate(chances) for chance in own),
        key=lambda row: -row[0],
    )[: max(0, most_rows - rows)]
    tokens, best, taken = float(rows), 0, 0.0
    if ordered:
        taken = tokens / seconds(rows)
    for count, (chance, _) in enumerate(ordered, 1):
        tokens += chance
        speed = tokens / seconds(rows + count)
        if speed > taken:
            best, taken = count, speed
    counts = [0] * len(chances)
    for _, r in ordered[:best]:
        counts[r] += 1
    return counts
