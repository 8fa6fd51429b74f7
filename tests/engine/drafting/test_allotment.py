"""The chosen numbers are the best of all numbers, tried one by one."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from myserve.engine.drafting.allotment import allot

chance = st.floats(0.01, 0.99)


@given(
    chances=st.lists(
        st.lists(chance, max_size=3).map(lambda c: sorted(c, reverse=True)), min_size=1, max_size=3
    ),
    most=st.integers(0, 9),
    dear=st.floats(0.0, 1.0),
    step=st.integers(1, 4),
)
def test_no_other_numbers_give_more_tokens_a_second(
    chances: list[list[float]], most: int, dear: float, step: int
) -> None:
    rows = len(chances)

    def seconds(count: int) -> float:
        return 1.0 + dear * (-(-count // step) * step)

    def speed(counts: tuple[int, ...]) -> float:
        tokens = sum(sum(own[:count]) for own, count in zip(chances, counts, strict=True))
        return (rows + tokens) / seconds(rows + sum(counts))

    chosen = tuple(allot(chances, rows, rows + most, seconds))
    assert sum(chosen) <= most
    best = max(
        speed(counts) for counts in product(*(range(len(own) + 1) for own in chances)) if sum(counts) <= most
    )
    assert abs(speed(chosen) - best) < 1e-9
