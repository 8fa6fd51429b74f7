"""Estimates how likely a drafted token is to be drawn, from how often such ones were: no two texts are alike in it."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Acceptance", "RequestAcceptance", "level_of"]

# A drafted token's level: how many tokens before it agree with the place that it was found at, in steps.
_LEVELS = (1, 2, 3, 4, 6, 9)
LEVELS = len(_LEVELS)
# Before anything was seen: shares on the real model that docs/speculation.md measures with, at temperature 0.7.
_FIRST_GUESS = (0.25, 0.4, 0.55, 0.7, 0.8, 0.9)
_GUESS_WEIGHT = 20.0  # observations that the first guess counts as
_MEMORY = 0.998  # of all requests together: weight of an observation as each further one comes
_OWN_MEMORY = 0.96  # of one request
_OWN_WEIGHT = 2.0  # expected tokens that "as all the others" counts as
HIGHEST = 0.99


def level_of(length: int) -> int:
    """Return the level of a token before which `length` tokens agree.

    >>> [level_of(length) for length in (0, 1, 2, 5, 40)]
    [0, 0, 1, 3, 5]
    """
    return max(0, sum(bound <= length for bound in _LEVELS) - 1)


class Acceptance:
    """The share of one drafter's tokens that were drawn, by level, over all requests; the latest count most.

    >>> acceptance = Acceptance()
    >>> for _ in range(50): acceptance.observe(level=5, drawn=False)
    >>> acceptance.chance(5) < 0.3 < acceptance.chance(4)
    True
    """

    def __init__(self) -> None:
        self._drawn = [guess * _GUESS_WEIGHT for guess in _FIRST_GUESS]
        self._seen = [_GUESS_WEIGHT] * LEVELS

    def chance(self, level: int) -> float:
        """Return how likely a token of this level is to be drawn."""
        return self._drawn[level] / self._seen[level]

    def observe(self, level: int, drawn: bool) -> None:
        """Take in whether a token of this level was drawn."""
        self._drawn[level] = _MEMORY * self._drawn[level] + drawn
        self._seen[level] = _MEMORY * self._seen[level] + 1.0


class RequestAcceptance:
    """One request's acceptance: that of all requests, times how much more or less it accepts than they do.

    >>> mine = RequestAcceptance({"ngram": Acceptance()})
    >>> before = mine.chance("ngram", 3)
    >>> for _ in range(8): mine.observe("ngram", 1, drawn=False)
    >>> mine.chance("ngram", 3) < before / 2
    True
    """

    def __init__(self, of_all: Mapping[str, Acceptance]) -> None:
        self._of_all = of_all
        self._drawn = dict.fromkeys(of_all, _OWN_WEIGHT)
        self._expected = dict.fromkeys(of_all, _OWN_WEIGHT)

    def chance(self, drafter: str, level: int) -> float:
        """Return how likely a token that this drafter proposes is to be drawn, given that those before it are."""
        ratio = self._drawn[drafter] / self._expected[drafter]
        return min(HIGHEST, ratio * self._of_all[drafter].chance(level))

    def observe(self, drafter: str, level: int, drawn: bool) -> None:
        """Take in whether a proposed token was drawn, as it would have been without the draft."""
        of_all = self._of_all[drafter]
        rest = _OWN_MEMORY
        self._drawn[drafter] = rest * self._drawn[drafter] + (1 - rest) * _OWN_WEIGHT + drawn
        self._expected[drafter] = (
            rest * self._expected[drafter] + (1 - rest) * _OWN_WEIGHT + of_all.chance(level)
        )
        of_all.observe(level, drawn)
