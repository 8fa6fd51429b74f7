"""How many prompt tokens fit into a step: from what steps were seen to cost, and no clock."""

from __future__ import annotations

import math

import pytest

from myserve.engine.scheduling.prompt_budget import PromptBudget
from myserve.engine.scheduling.step_costs import (
    DRAWS,
    LEAST_SLOWDOWN,
    LONGEST_PROMPT_STEP,
    MIN_PROMPT_TOKENS,
    PROMPT_SPEED,
    READING_PACE,
    SLOWDOWN,
    AttentionCost,
    StepCosts,
    nearest_padded_rows,
    padded_rows,
)

BASE, PER_TOKEN = 0.045, 0.0021  # eight streams of a 0.6B model on two cores
READS_ALL = (AttentionCost(window=0, cost=0.00034),)


def learned(
    target: float | None = None,
    base: float = BASE,
    per_token: float = PER_TOKEN,
    attention: tuple[AttentionCost, ...] = (),
) -> StepCosts:
    costs = StepCosts(target, attention)
    costs.observe(0, costs.work(100, 0), per_token * costs.work(100, 0))
    costs.observe(8, 0.0, base)
    return costs


def tokens_beside(costs: StepCosts, decodes: int = 8, most: int = 256, context: int = 0) -> int:
    return PromptBudget(costs, decodes, most).offer(pending=10_000, context=context)


def seconds(tokens: int, base: float = BASE, per_token: float = PER_TOKEN, decodes: int = 8) -> float:
    """The step that `learned` expects: a prompt reads the weights, decodes beside it are rows like others."""
    return DRAWS * base + (decodes + tokens) * per_token


def test_prompts_keep_their_share_of_speed_where_a_reader_keeps_up() -> None:
    tokens = tokens_beside(learned())
    rows = 8  # of a recording, nearest to what was meant
    assert PROMPT_SPEED * 256 / seconds(256) <= (tokens + rows) / seconds(tokens + rows)
    assert (tokens - rows) / seconds(tokens - rows) < PROMPT_SPEED * 256 / seconds(256)
    assert seconds(tokens) <= READING_PACE + rows * PER_TOKEN


def test_no_step_is_longer_than_a_reader_waits_however_slow_prompts_are() -> None:
    slow = learned(per_token=0.004)
    assert seconds(tokens_beside(slow), per_token=0.004) <= READING_PACE + 8 * 0.004


def test_streams_are_slowed_by_their_own_pace_where_prompts_are_cheap() -> None:
    tokens = tokens_beside(learned(per_token=0.0004), most=512)
    assert seconds(tokens, per_token=0.0004) / BASE == pytest.approx(SLOWDOWN, abs=32 * 0.0004 / BASE)


def test_streams_that_are_slow_themselves_wait_for_prompts_by_their_own_pace() -> None:
    """A step of many streams takes longer than a reader waits already: prompts must go on all the same."""
    tokens = tokens_beside(learned(base=0.3), most=512)
    assert seconds(tokens, base=0.3) / 0.3 == pytest.approx(LEAST_SLOWDOWN, rel=0.1)


@pytest.mark.parametrize("target", [0.1, 0.2, 0.4])
def test_a_target_is_met_but_for_the_rows_that_fill_a_recording(target: float) -> None:
    tokens = tokens_beside(learned(target))
    assert seconds(tokens) == pytest.approx(target, abs=16 * PER_TOKEN)


def test_a_prompt_goes_on_however_small_the_target() -> None:
    assert tokens_beside(learned(0.001)) >= MIN_PROMPT_TOKENS / 2


@pytest.mark.parametrize("decodes", [1, 5, 8, 31, 63])
def test_the_rows_of_a_prompt_that_is_cut_fill_a_recording(decodes: int) -> None:
    rows = decodes + tokens_beside(learned(), decodes)
    assert rows == padded_rows(rows) == nearest_padded_rows(rows)


def test_a_prompt_reads_more_the_further_it_is_and_runs_in_smaller_parts() -> None:
    costs = learned(attention=READS_ALL)
    parts = [tokens_beside(costs, context=context) for context in (0, 2000, 8000)]
    assert parts == sorted(parts, reverse=True) and parts[0] > 2 * parts[2]
    for context, tokens in zip((0, 2000, 8000), parts, strict=True):
        assert BASE + costs.seconds_of_prompt(tokens, context) <= READING_PACE + 8 * 0.01
    windowed = learned(attention=(AttentionCost(512, 0.00034),))
    assert tokens_beside(windowed, context=8000) == tokens_beside(windowed, context=1000)


def test_what_a_token_costs_is_learned_the_same_wherever_it_is_read() -> None:
    near, far = (StepCosts(attention=READS_ALL) for _ in range(2))
    near.observe(0, near.work(100, 0), near.work(100, 0) * PER_TOKEN)
    far.observe(0, far.work(100, 4000), far.work(100, 4000) * PER_TOKEN)
    assert near.seconds_of_prompt(50, 100) == pytest.approx(far.seconds_of_prompt(50, 100))


def test_one_slow_step_is_no_lesson_and_thirty_are() -> None:
    costs, usual = learned(0.3), tokens_beside(learned(0.3))
    costs.observe(8, 100.0, 60.0)
    assert tokens_beside(costs) >= usual / 2
    for _ in range(30):
        costs.observe(8, 100.0, seconds(100, per_token=0.02))
    assert tokens_beside(costs) <= 24


def test_a_faster_step_is_believed_sooner_than_a_slower_one() -> None:
    costs = StepCosts()
    costs.observe(8, 0.0, 10 * BASE)  # the first of its kind: its shape was recorded on the way
    for _ in range(5):
        costs.observe(8, 0.0, BASE)
    assert costs.seconds_of_decodes(8) <= 1.5 * BASE


def test_unknown_numbers_of_streams_cost_what_the_nearest_known_do() -> None:
    costs = learned(0.2)
    costs.observe(60, 0.0, 0.15)
    assert tokens_beside(costs, 50) < tokens_beside(costs, 9)


def test_prompts_alone_end_a_step_in_time_for_the_next_prompt() -> None:
    tokens = PromptBudget(learned(), decodes=0, tokens=512).offer(pending=5000, context=0)
    assert seconds(tokens, base=0) == pytest.approx(LONGEST_PROMPT_STEP, abs=16 * PER_TOKEN)
    fast = PromptBudget(learned(per_token=0.0001), decodes=0, tokens=512)
    assert fast.offer(pending=5000, context=0) == 512


def test_several_prompts_share_a_steps_seconds() -> None:
    budget = PromptBudget(learned(), decodes=8, tokens=256)
    spent = [budget.take(pending=30, context=0) for _ in range(5)]
    assert spent[:2] == [30, 30] and spent[-1] == 0
    assert BASE + PER_TOKEN * sum(spent) <= READING_PACE + 8 * PER_TOKEN


def test_control_nothing_is_bounded_before_anything_is_known() -> None:
    assert math.isinf(StepCosts().seconds_for_prompts(8, 256)) and tokens_beside(StepCosts()) == 256 - 8
