"""The core's own exp, log and sums: accurate, and the same bits in any company."""

from __future__ import annotations

import math

import pytest
import torch

from myserve.core.numerics import MASS_ONE, exp, log_mass, neg_log1m, quanta
from myserve.core.stages import entropy_of, log_total


def test_exp_within_an_ulp_of_the_exact_value() -> None:
    x = -torch.linspace(0, 87, 200_001)
    error = (exp(x).double() / x.double().exp() - 1).abs().max()
    assert error < 2.0**-23
    assert exp(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]


def test_exp_is_monotone_around_every_power_of_two() -> None:
    edges = -math.log(2.0) * (torch.arange(0, 120, dtype=torch.float64) + 0.5)
    around = edges.to(torch.float32).unsqueeze(1) + torch.linspace(-1e-3, 1e-3, 2001)
    values = exp(around)
    assert bool((values.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("v", [0.0, 2.0**-65, 1e-12, 0.25, 0.29289, 0.29290, 0.5, 0.9, 1 - 2.0**-53])
def test_log_in_both_tails(v: float) -> None:
    ours = neg_log1m(torch.tensor(v, dtype=torch.float64)).item()
    assert ours == pytest.approx(-math.log1p(-v), rel=4e-16, abs=0)


def test_log_total_agrees_with_math() -> None:
    totals = torch.tensor([int(MASS_ONE), int(MASS_ONE) * 3, int(MASS_ONE * 151_935.7)])
    for total, ours in zip(totals.tolist(), log_total(totals).tolist(), strict=True):
        assert ours == pytest.approx(log_mass(total), rel=1e-15, abs=1e-15)
        assert log_mass(total) == pytest.approx(math.log(total / MASS_ONE))


def test_entropy_of_known_distributions() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, -torch.inf, -torch.inf, -torch.inf]])
    largest = scores.amax(-1, keepdim=True)
    weights = exp(scores - largest)
    total = quanta(weights).sum(-1, keepdim=True)
    assert entropy_of(largest, scores, weights, total)[:, 0].tolist() == pytest.approx([math.log(4), 0.0])


@pytest.mark.usefixtures("two_threads")
def test_mass_is_the_same_alone_and_in_a_batch_where_a_float_sum_is_not() -> None:
    weights = torch.rand(64, 40_003, generator=torch.Generator().manual_seed(0))
    together = quanta(weights).sum(-1)
    alone = torch.stack([quanta(row).sum() for row in weights])
    assert torch.equal(together, alone)
    # the control: this is the operation that was rejected
    assert not torch.equal(weights.sum(-1), torch.stack([row.sum() for row in weights]))
