"""Tests of draws against probabilities, whose false-alarm rates are known: chi-square, and exact binomial tails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["OTHER", "Fit", "binomial_tail", "chi_square_tail", "fit"]

OTHER = "(all others)"
# A bin is expected to hold so many draws at least; smaller ones are merged. Chi-square's tail is an approximation,
# which is within a factor of two at one in a hundred thousand from here on (tests/verify/test_statistics.py).
LEAST_EXPECTED = 20


@dataclass(frozen=True, slots=True)
class Fit:
    """Hold how well draws fit probabilities: the chance of a fit as bad as this one or worse, if they are right."""

    p_value: float
    num_draws: int
    num_bins: int
    worst: str  # the bin furthest off, in words


def chi_square_tail(value: float, degrees: int) -> float:
    """Return the chance that chi-square with `degrees` of freedom is at least `value`; exact, in closed form.

    >>> round(chi_square_tail(3.841458820694124, 1), 12), round(chi_square_tail(5.991464547107979, 2), 12)
    (0.05, 0.05)
    """
    if value <= 0:
        return 1.0
    half = value / 2
    if degrees % 2:
        total, term, start = math.erfc(math.sqrt(half)), math.sqrt(half) / math.gamma(1.5), 1.5
    else:
        total, term, start = 0.0, 1.0, 1.0
    for step in range(degrees // 2):
        total += term * math.exp(-half)
        term *= half / (start + step)
    return min(1.0, total)


def binomial_tail(hits: int, trials: int, probability: float) -> float:
    """Return the chance of at least `hits` in `trials`, each with `probability`; exact.

    >>> round(binomial_tail(3, 3, 0.5), 12), binomial_tail(0, 5, 0.1)
    (0.125, 1.0)
    """
    if hits <= 0:
        return 1.0
    if probability <= 0.0 or hits > trials:
        return 0.0
    if probability >= 1.0:
        return 1.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    top = math.lgamma(trials + 1)
    terms = (
        top - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q
        for k in range(hits, trials + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def fit(drawn: Mapping[str, int], probabilities: Mapping[str, float]) -> Fit | None:
    """Return how well counts of draws fit; None where they are too few for a test.

    A name that is drawn and has no probability, or 0, fits nothing: its p-value is 0.

    >>> fit({"a": 51, "b": 49}, {"a": 0.5, "b": 0.5}).p_value > 0.5
    True
    >>> fit({"a": 99, "c": 1}, {"a": 1.0}).p_value
    0.0
    """
    num_draws = sum(drawn.values())
    impossible = {name: count for name, count in drawn.items() if count and probabilities.get(name, 0.0) <= 0}
    if impossible:
        name = max(impossible, key=impossible.__getitem__)
        return Fit(0.0, num_draws, len(probabilities), f"{name!r}: {impossible[name]} draws of 0 expected")
    total = math.fsum(probabilities.values())
    expected = {name: num_draws * p / total for name, p in probabilities.items() if p > 0}
    bins = _merged(expected)
    if len(bins) < 2:
        return None
    pulls = {}
    for names in bins:
        seen, mean = sum(drawn.get(name, 0) for name in names), math.fsum(expected[name] for name in names)
        pulls[names] = ((seen - mean) ** 2 / mean, seen, mean)
    chi_square = math.fsum(pull for pull, _, _ in pulls.values())
    names, (_, seen, mean) = max(pulls.items(), key=lambda item: item[1][0])
    label = repr(names[0]) if len(names) == 1 else f"{len(names)} rare ones"
    worst = f"{label}: {seen} draws, {mean:.0f} expected"
    return Fit(chi_square_tail(chi_square, len(bins) - 1), num_draws, len(bins), worst)


def _merged(expected: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return the names in bins that are large enough: the rare ones share one."""
    rare = sorted((name for name in expected if expected[name] < LEAST_EXPECTED), key=expected.__getitem__)
    common = sorted((name for name in expected if expected[name] >= LEAST_EXPECTED), key=expected.__getitem__)
    while rare and common and math.fsum(expected[name] for name in rare) < LEAST_EXPECTED:
        rare.append(common.pop(0))
    return [(name,) for name in common] + ([tuple(rare)] if rare else [])
