"""Estimates follow what is drawn: of all requests slowly, of one request soon."""

from __future__ import annotations

from myserve.engine.drafting.acceptance import LEVELS, Acceptance, RequestAcceptance, level_of


def test_levels_rise_with_the_match() -> None:
    levels = [level_of(length) for length in range(1, 30)]
    assert levels == sorted(levels) and set(levels) == set(range(LEVELS))


def test_the_share_that_is_drawn_is_learned() -> None:
    acceptance = Acceptance()
    for i in range(4000):
        acceptance.observe(2, drawn=i % 4 == 0)
    assert abs(acceptance.chance(2) - 0.25) < 0.05
    assert acceptance.chance(1) == Acceptance().chance(1)


def test_a_request_unlike_the_others_is_soon_known() -> None:
    of_all = {"ngram": Acceptance()}
    one, other = RequestAcceptance(of_all), RequestAcceptance(of_all)
    for _ in range(12):
        one.observe("ngram", 3, drawn=False)
        other.observe("ngram", 3, drawn=True)
    assert one.chance("ngram", 3) < 0.3 < 0.6 < other.chance("ngram", 3)
