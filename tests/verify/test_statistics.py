"""The tests of draws: tails against SciPy's, and false alarms as often as they say, on simulated draws."""

from __future__ import annotations

import numpy
import pytest
import scipy.stats

from myserve.verify.statistics import OTHER, binomial_tail, chi_square_tail, fit


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 10, 20])
@pytest.mark.parametrize("value", [0.1, 1.0, 10.0, 45.0, 90.0])
def test_chi_squares_tail_is_scipys(value: float, degrees: int) -> None:
    assert chi_square_tail(value, degrees) == pytest.approx(scipy.stats.chi2.sf(value, degrees), rel=1e-9)


@pytest.mark.parametrize(
    ("hits", "trials", "p"), [(1, 1, 0.5), (30, 256, 0.1), (128, 128, 0.9), (3, 4000, 1e-4)]
)
def test_the_binomial_tail_is_scipys(hits: int, trials: int, p: float) -> None:
    assert binomial_tail(hits, trials, p) == pytest.approx(
        scipy.stats.binom.sf(hits - 1, trials, p), rel=1e-9
    )


def test_false_alarms_are_as_rare_as_they_say() -> None:
    """8,000 simulated runs on the distribution of a language model: a few likely tokens, many rare ones."""
    weights = 0.75 ** numpy.arange(21)
    weights /= weights.sum()
    names = [*map(str, range(20)), OTHER]
    expected = dict(zip(names, weights.tolist(), strict=True))
    counts = numpy.random.default_rng(5).multinomial(400, weights, size=8_000)
    found = numpy.array(
        [fit(dict(zip(names, row.tolist(), strict=True)), expected).p_value for row in counts]
    )  # type: ignore[union-attr]
    for rate in (3e-2, 3e-3):
        assert (found < rate).mean() < 2 * rate
    assert (found < 0.1).mean() == pytest.approx(0.1, abs=0.02)


def test_draws_from_another_distribution_are_found() -> None:
    weights = 0.75 ** numpy.arange(10)
    hotter = weights ** (1 / 1.3)
    drawn = numpy.random.default_rng(5).multinomial(2000, hotter / hotter.sum())
    expected = {str(i): w for i, w in enumerate(weights.tolist())}
    found = fit({str(i): int(count) for i, count in enumerate(drawn)}, expected)
    assert found is not None and found.p_value < 1e-6


def test_an_impossible_draw_is_certain_and_too_few_are_none() -> None:
    assert fit({"a": 50, "b": 49, "c": 1}, {"a": 0.5, "b": 0.5}).p_value == 0.0  # type: ignore[union-attr]
    assert fit({"a": 2, "b": 1}, {"a": 0.5, "b": 0.5}) is None
