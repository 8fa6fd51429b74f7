"""What rows cost is learned, noise is damped, and what was once too costly is tried again."""

from __future__ import annotations

import random

from myserve.engine.scheduling.row_costs import ROW_COUNTS, RowCosts, padded_draft_rows


def test_costs_that_rise_as_measured_are_learned_while_the_level_moves() -> None:
    costs, rng = RowCosts(), random.Random(0)
    true = {1: 1.0, 5: 1.5, 12: 2.5}
    for i in range(600):
        rows = rng.choice([1, 5, 12])
        costs.observe(rows, 0.02 * (1 + i / 600) * true[rows] * rng.uniform(0.95, 1.05))
    for rows, cost in true.items():
        assert abs(costs.relative(rows) / costs.relative(1) / cost - 1) < 0.15


def test_one_slow_step_changes_little() -> None:
    costs = RowCosts()
    for _ in range(50):
        costs.observe(1, 0.02)
        costs.observe(5, 0.022)
    before = costs.relative(5) / costs.relative(1)
    costs.observe(5, 2.0)
    assert costs.relative(5) / costs.relative(1) < 1.1 * before


def test_a_number_of_rows_that_was_too_dear_is_tried_again_one_day() -> None:
    costs = RowCosts()
    for _ in range(60):
        costs.observe(1, 0.02)
        costs.observe(8, 0.2)
    dear = costs.relative(8) / costs.relative(1)
    for _ in range(2000):
        costs.observe(1, 0.02)
    assert costs.relative(8) / costs.relative(1) < dear / 3


def test_padding_goes_to_the_next_recorded_step() -> None:
    assert [padded_draft_rows(rows) for rows in ROW_COUNTS] == list(ROW_COUNTS)
    assert padded_draft_rows(2) == 2 and padded_draft_rows(33) == 40
