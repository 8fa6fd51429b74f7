"""The split of the sums: what is held out is never drawn for training, in any order."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from myserve.embedded import arithmetic


@given(st.integers(0, 99), st.integers(0, 99))
def test_the_split_is_symmetric(a: int, b: int) -> None:
    assert arithmetic.is_held_out(a, b) == arithmetic.is_held_out(b, a)


def test_one_pair_in_ten_is_held_out() -> None:
    share = len(list(arithmetic.two_digit_pairs(held_out=True))) / 8100
    assert 0.08 < share < 0.12


def test_held_out_pairs_are_spread_over_the_sums() -> None:
    # A split by sum or by last digit would make the held-out pairs a different task.
    sums = {a + b for a, b in arithmetic.two_digit_pairs(held_out=True)}
    ends = {(a % 10, b % 10) for a, b in arithmetic.two_digit_pairs(held_out=True)}
    assert len(sums) > 130 and len(ends) == 100


def test_training_draws_no_held_out_sum() -> None:
    rng = Random(0)
    held_out = {
        phrasing.format(a=a, b=b)
        for phrasing in arithmetic.SUM_PHRASINGS
        for a, b in arithmetic.two_digit_pairs(held_out=True)
    }
    drawn = {arithmetic.two_digit_sum(rng)[0] for _ in range(20_000)}
    assert not drawn & held_out
    # The control: the same comparison does see the other side of the split.
    assert drawn & {"Solve: {}+{}=".format(*pair) for pair in arithmetic.two_digit_pairs(held_out=False)}


def test_every_answer_is_right() -> None:
    rng = Random(1)
    for _ in range(2_000):
        for draw, operate in (
            (arithmetic.one_digit_sum, int.__add__),
            (arithmetic.two_digit_sum, int.__add__),
            (arithmetic.one_digit_difference, int.__sub__),
        ):
            question, answer = draw(rng)
            a, b = (int(number) for number in "".join(c if c.isdigit() else " " for c in question).split())
            assert int(answer) == operate(a, b)
