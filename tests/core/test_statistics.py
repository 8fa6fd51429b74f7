"""What is drawn follows the exact distribution: chi-square on small vocabularies, z-scores in a large one's tail.

Every test of a distribution is run on planted wrong samplers too, and must refuse them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from myserve.core.noise import OPENED_ON_CPU, CounterKey, draw_counter
from myserve.core.numerics import weights_of
from myserve.core.sampling import RowState, Sampled, Sampler
from runs import thorough

DRAWS = 12_000
BATCH = 3_000
MakeRow = Callable[..., RowState]

ACCEPT, REFUSE = 1e-3, 1e-9  # p-values: everything is seeded, so a pass is a pass for ever

MIXES: list[dict[str, object]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_p": 0.8},
    {"top_k": 5},
    {"top_p": 0.55},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"top_n_sigma": 1.0},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "frequency_penalty": 0.7},
]


def logits_of(vocab: int) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 1.5


def exact(logits: Tensor, mix: dict[str, object]) -> Tensor:
    """The behaviour distribution in float64, written out with none of the core's code."""
    z = logits.double()
    if "frequency_penalty" in mix:
        z = z - mix["frequency_penalty"] * torch.bincount(torch.tensor([1, 2, 2]), minlength=len(z))
    z = z / mix.get("temperature", 1.0)
    whole = z.clone()
    if k := mix.get("top_k"):
        z[z < z.sort(descending=True).values[min(k, len(z)) - 1]] = -torch.inf
    if p := mix.get("top_p"):
        order = z.argsort(descending=True)
        before = z.softmax(-1)[order].cumsum(-1) - z.softmax(-1)[order]
        z[order[before >= p]] = -torch.inf
    if min_p := mix.get("min_p"):
        z[z.softmax(-1) < min_p * z.softmax(-1).max()] = -torch.inf
    if mass := mix.get("typical_p"):
        surprise = -z.log_softmax(-1)
        strange = (surprise - (z.softmax(-1) * surprise).sum()).abs()
        order = strange.argsort()
        before = z.softmax(-1)[order].cumsum(-1) - z.softmax(-1)[order]
        z[order[before >= mass]] = -torch.inf
    if n := mix.get("top_n_sigma"):
        z[z < whole.max() - n * whole.std(correction=0)] = -torch.inf
    return z.softmax(-1)


def draw(logits: Tensor, mix: dict[str, object], make_row: MakeRow, draws: int = DRAWS) -> list[int]:
    tokens: list[int] = []
    batch = logits.expand(BATCH, -1)
    for start in range(0, draws, BATCH):
        rows = [
            make_row(seed=seed // 4, index=seed % 4, completion=(1, 2, 2), vocab=len(logits), **mix)
            for seed in range(start, start + BATCH)
        ]
        sampled = Sampler().sample(batch, rows)
        tokens += [drawn.token_id for drawn in sampled if isinstance(drawn, Sampled)]
    return tokens


def p_value(tokens: list[int], distribution: Tensor) -> float:
    """Of a chi-square test against the exact distribution; 0 for a token that is out of the support."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(distribution)).double()
    expected = distribution * len(tokens)
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    rare = expected < 5  # as one cell together, for the chi-square approximation to hold
    observed = torch.cat((counts[~rare], counts[rare].sum().view(1)))
    predicted = torch.cat((expected[~rare], expected[rare].sum().view(1)))
    cells = predicted > 0
    return float(stats.chisquare(observed[cells].numpy(), predicted[cells].numpy()).pvalue)


@pytest.mark.parametrize("vocab", [8, thorough(16), 64])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(mix) or "plain")
def test_draws_follow_the_exact_distribution(vocab: int, mix: dict[str, object], make_row: MakeRow) -> None:
    logits = logits_of(vocab)
    distribution = exact(logits, mix)
    tokens = draw(logits, mix, make_row)
    assert p_value(tokens, distribution) > ACCEPT
    likely = (distribution * DRAWS > 20).nonzero()[:, 0].tolist()
    assert set(likely) <= set(tokens)  # and nothing of the support is missing


def test_a_temperature_five_per_cent_off_is_refused(make_row: MakeRow) -> None:
    logits = logits_of(64)
    assert p_value(draw(logits, {"temperature": 1.05}, make_row, 36_000), exact(logits, {})) < REFUSE


def test_a_nucleus_without_the_crossing_token_is_refused(make_row: MakeRow) -> None:
    logits = logits_of(16)
    distribution = exact(logits, {"top_p": 0.8})
    without = logits.clone()
    without[distribution.where(distribution > 0, 2.0).argmin()] = -torch.inf
    assert p_value(draw(without, {"top_p": 0.8}, make_row), distribution) < REFUSE


def test_a_seed_that_is_added_to_the_index_is_refused(make_row: MakeRow) -> None:
    logits = logits_of(64)

    def pairs(key: Callable[[int, int], dict[str, int]]) -> int:
        """How often sample 1 of a seed equals sample 0 of the next: by chance, or always."""
        rows = [make_row(vocab=64, **key(seed, index)) for seed in range(500) for index in range(2)]
        sampled = Sampler().sample(logits.expand(1000, -1), rows)
        tokens = [drawn.token_id for drawn in sampled if isinstance(drawn, Sampled)]
        return sum(a == b for a, b in zip(tokens[1::2], tokens[2::2], strict=False))

    chance = float(exact(logits, {}).square().sum()) * 499
    assert abs(pairs(lambda seed, index: {"seed": seed, "index": index}) - chance) < 5 * chance**0.5
    assert pairs(lambda seed, index: {"seed": seed + index}) == 499


def test_successive_tokens_are_independent(make_row: MakeRow) -> None:
    logits = torch.zeros(8)
    rows = [make_row(seed=seed, vocab=8) for seed in range(4)]
    tokens: list[list[int]] = [[] for _ in rows]
    for _ in range(2_000):
        for drawn, row, seen in zip(Sampler().sample(logits.expand(4, -1), rows), rows, tokens, strict=True):
            assert isinstance(drawn, Sampled)
            row.append(drawn.token_id)
            seen.append(drawn.token_id)
    for seen in tokens:
        pairs = [8 * a + b for a, b in itertools.pairwise(seen)]
        assert p_value(pairs, torch.full((64,), 1 / 64)) > ACCEPT
    across = [8 * a + b for a, b in zip(tokens[0], tokens[1], strict=True)]
    assert p_value(across, torch.full((64,), 1 / 64)) > ACCEPT


# -- the tail of a large vocabulary -----------------------------------------------------------------------

TAIL_VOCAB = 40_000
TAIL_WEIGHT = 1e-7  # each: 0.4 % of all draws fall anywhere in the tail


def tail_draws(count: int) -> list[int]:
    scores = torch.full((1, TAIL_VOCAB), float(torch.tensor(TAIL_WEIGHT).log()))
    scores[0, 17] = 0.0
    weights = weights_of(scores)[1].expand(500, -1)
    winners = []
    for start in range(0, count, 500):
        keys = [CounterKey(seed, 0, 9, 0) for seed in range(start, start + 500)]
        drawn, sure = draw_counter(weights, keys, OPENED_ON_CPU)
        assert sure.all()
        winners += drawn.tolist()
    return [token_id for token_id in winners if token_id != 17]


def tail_z(hits: int, count: int) -> float:
    mass = TAIL_WEIGHT * (TAIL_VOCAB - 1)
    expected = count * mass / (1 + mass)
    return (hits - expected) / expected**0.5


def test_tail_events_come_as_often_as_they_should() -> None:
    tail = tail_draws(5_000)
    assert abs(tail_z(len(tail), 5_000)) < 4
    assert len(set(tail)) > 0.9 * len(tail)  # anywhere in the tail, not at favourite places
