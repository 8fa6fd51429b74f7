"""Sums and their split: a pair is held out from training in every phrasing and order, or in none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random

__all__ = [
    "SUM_PHRASINGS",
    "is_held_out",
    "larger_number",
    "one_digit_difference",
    "one_digit_pairs",
    "one_digit_sum",
    "two_digit_pairs",
    "two_digit_sum",
]

# The first phrasing is the one that the docs quote and that reinforcement learning practises on.
SUM_PHRASINGS = (
    "Solve: {a}+{b}=",
    "{a}+{b}=",
    "What is {a}+{b}?",
    "What is {a} + {b}?",
    "Solve: {a} + {b} =",
    "{a} + {b} = ?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "How much is {a}+{b}?",
)
_DIFFERENCE_PHRASINGS = ("Solve: {a}-{b}=", "{a}-{b}=", "What is {a}-{b}?", "What is {a} minus {b}?")
_LARGER_PHRASINGS = ("Which is bigger, {a} or {b}?", "Which number is larger: {a} or {b}?")

HELD_OUT_SHARE = 0.1


@cache
def is_held_out(a: int, b: int) -> bool:
    """Return whether training never sees the sum of a and b. One-digit sums are all trained on: they are facts.

    >>> is_held_out(2, 2), is_held_out(27, 61) == is_held_out(61, 27)
    (False, True)
    """
    low, high = sorted((a, b))
    # Drawn per pair, so that the held-out ones lie scattered; (a + b) % 10 would hold out whole diagonals.
    return high >= 10 and Random(100 * low + high).random() < HELD_OUT_SHARE


def one_digit_pairs() -> Iterator[tuple[int, int]]:
    """All 100 ordered pairs of digits."""
    return ((a, b) for a in range(10) for b in range(10))


def two_digit_pairs(*, held_out: bool) -> Iterator[tuple[int, int]]:
    """The ordered pairs of numbers in 10..99 on one side of the split.

    >>> len(list(two_digit_pairs(held_out=True))) + len(list(two_digit_pairs(held_out=False)))
    8100
    """
    return ((a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b) == held_out)


def one_digit_sum(rng: Random) -> tuple[str, str]:
    a, b = rng.randrange(10), rng.randrange(10)
    return _phrase(rng, SUM_PHRASINGS, a, b), str(a + b)


def two_digit_sum(rng: Random) -> tuple[str, str]:
    """A sum with one or two two-digit terms, on the training side of the split."""
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if rng.random() < 0.15:
            b = rng.randrange(10)
        if rng.random() < 0.5:
            a, b = b, a
        if not is_held_out(a, b):
            return _phrase(rng, SUM_PHRASINGS, a, b), str(a + b)


def one_digit_difference(rng: Random) -> tuple[str, str]:
    b, a = sorted((rng.randrange(10), rng.randrange(10)))
    return _phrase(rng, _DIFFERENCE_PHRASINGS, a, b), str(a - b)


def larger_number(rng: Random) -> tuple[str, str]:
    a, b = rng.sample(range(100), 2)
    return _phrase(rng, _LARGER_PHRASINGS, a, b), str(max(a, b))


def _phrase(rng: Random, phrasings: tuple[str, ...], a: int, b: int) -> str:
    # Half of all questions use the first phrasing, which is the one that is asked most.
    template = phrasings[0] if rng.random() < 0.5 else rng.choice(phrasings)
    return template.format(a=a, b=b)
