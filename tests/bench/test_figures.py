"""The arithmetic: percentiles as numpy has them, steps counted where all streams decode and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myserve.bench.figures import RequestTimes, figures, median_of, ms_per_step, percentile


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-9, abs=1e-6)


def steady(started: float, first: float, step: float, tokens: int) -> RequestTimes:
    return RequestTimes(started, tuple(first + i * step for i in range(tokens)), tokens, prompt_tokens=10)


@given(
    step=st.floats(0.01, 1.0),
    firsts=st.lists(st.floats(0.0, 0.005), min_size=1, max_size=8),
    tokens=st.integers(4, 50),
)
def test_a_steady_step_is_found_whatever_the_number_of_streams(
    step: float, firsts: list[float], tokens: int
) -> None:
    """Streams start within half a step of each other, as a server that packs them makes them."""
    found = ms_per_step([steady(0.0, first, step, tokens) for first in firsts])
    assert found == pytest.approx(1e3 * step, rel=1e-6)


def test_steps_that_wait_for_another_streams_prefill_do_not_count() -> None:
    early = RequestTimes(
        0.0, (1.0, 2.0, 3.0, 3.1, 3.2, 3.3), 6, 10
    )  # one step a second while the other prefills
    late = RequestTimes(0.0, (3.0, 3.1, 3.2, 3.3), 4, 10)
    assert ms_per_step([early, late]) == pytest.approx(100)
    assert ms_per_step([early]) == pytest.approx(460), "the control: alone, they do count"


def test_tokens_that_came_two_at_once_are_two_steps() -> None:
    assert ms_per_step([RequestTimes(0.0, (1.0, 1.2, 1.4), 6, 10)]) == pytest.approx(100)


def test_streams_that_never_decode_together_have_no_step() -> None:
    assert ms_per_step([steady(0.0, 1.0, 0.1, 3), steady(0.0, 9.0, 0.1, 3)]) is None
    assert ms_per_step([steady(0.0, 1.0, 0.1, 1)]) is None


def test_throughput_counts_prefill_and_a_shared_prompt_once() -> None:
    choices = [RequestTimes(1.0, (1.5, 2.0, 3.0), 3, prompt_tokens=100) for _ in range(8)]
    run = figures(choices, requests=1)
    assert run.tokens_per_s == pytest.approx(8 * 3 / 2.0)
    assert run.prefill_tokens_per_s == pytest.approx(100 / 0.5)
    assert run.requests_per_s == pytest.approx(0.5)
    assert figures(choices, requests=8).prefill_tokens_per_s == pytest.approx(800 / 0.5)


def test_one_slow_run_does_not_move_the_median() -> None:
    runs = [figures([steady(0.0, 0.1, step, 5)], requests=1) for step in (0.1, 0.1, 7.0)]
    assert median_of(runs) == runs[0]
    assert runs[2] != runs[0]
