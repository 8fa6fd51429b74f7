"""How many prompt tokens fit beside running streams: from what steps were seen to cost, and no clock."""

from __future__ import annotations

import pytest

from myserve.engine.scheduling.step_costs import PROMPT_SPEED, SLOWDOWN, StepCosts, padded_rows

BASE, PER_TOKEN = 0.045, 0.0029  # eight streams of a 0.6B model on two cores


def learned(target: float | None = None, base: float = BASE, per_token: float = PER_TOKEN) -> StepCosts:
    costs = StepCosts(target)
    costs.observe(0, 100, 100 * per_token)
    costs.observe(8, 0, base)
    return costs


def seconds(tokens: int, base: float = BASE, per_token: float = PER_TOKEN) -> float:
    return base + tokens * per_token


def test_prompts_keep_their_share_of_speed_where_that_needs_longer_steps() -> None:
    tokens = learned().prompt_tokens(8, 256)
    speed, largest = tokens / seconds(tokens), 256 / seconds(256)
    assert PROMPT_SPEED * largest <= speed
    fewer = tokens - 32
    assert fewer / seconds(fewer) < PROMPT_SPEED * largest, "and no more than that takes"


def test_streams_are_slowed_by_their_own_pace_where_prompts_are_cheap() -> None:
    tokens = learned(per_token=0.0002).prompt_tokens(8, 512)
    slowed = seconds(tokens, per_token=0.0002) / BASE
    assert SLOWDOWN <= slowed <= SLOWDOWN + 32 * 0.0002 / BASE


@pytest.mark.parametrize("target", [0.1, 0.2, 0.4])
def test_a_target_is_met_but_for_the_rows_that_fill_a_recording(target: float) -> None:
    tokens = learned(target).prompt_tokens(8, 256)
    assert target - 32 * PER_TOKEN <= seconds(tokens) <= target + 32 * PER_TOKEN


def test_a_prompt_goes_on_however_small_the_target() -> None:
    assert learned(0.001).prompt_tokens(8, 256) >= 16


@pytest.mark.parametrize("decodes", [1, 5, 8, 31, 63])
def test_the_rows_fill_a_recording(decodes: int) -> None:
    rows = decodes + learned().prompt_tokens(decodes, 256)
    assert rows == padded_rows(rows)


def test_one_slow_step_is_no_lesson_and_twenty_are() -> None:
    costs, usual = learned(0.3), learned(0.3).prompt_tokens(8, 256)
    costs.observe(8, 100, 60.0)
    assert costs.prompt_tokens(8, 256) >= usual / 2
    for _ in range(20):
        costs.observe(8, 100, seconds(100, per_token=0.02))
    assert costs.prompt_tokens(8, 256) <= 24


def test_unknown_numbers_of_streams_cost_what_the_nearest_known_do() -> None:
    costs = learned(0.2)
    costs.observe(60, 0, 0.15)
    assert costs.prompt_tokens(50, 256) < costs.prompt_tokens(9, 256)
