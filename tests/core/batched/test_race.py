"""The first to arrive are those of the whole race, in order, and the first of them is the draw's winner."""

from __future__ import annotations

import torch

from myserve.core.batched.race import first_arrivals, first_torch_arrivals
from myserve.core.noise import (
    BLOCK,
    CounterKey,
    CounterNoise,
    TorchNoise,
    block_noise,
    draw_counter,
    draw_torch,
    token_noise,
)


def noise(key: CounterKey, vocab_size: int) -> torch.Tensor:
    """Return e_i of every token, float64."""
    column, ids = torch.tensor(key), torch.arange(vocab_size)
    return token_noise(ids, column, *block_noise(ids // BLOCK, column))


def test_the_first_arrivals_are_those_of_the_race_with_every_block_open() -> None:
    generator = torch.Generator().manual_seed(5)
    for V, count in [(1, 3), (64, 64), (700, 20), (700, 1000), (40_000, 20), (40_000, 200)]:
        for heat in (0.0, 1.0, 6.0):
            weights = (torch.randn(V, generator=generator) * heat).exp()
            weights[torch.rand(V, generator=generator) < 0.3] = 0.0
            weights[V // 2] = 1.0
            key = CounterNoise(7, V).at(count)
            ids, told, times = first_arrivals(weights, torch.tensor([key]), count)
            arrivals = noise(key, V) / weights
            expected = arrivals.argsort()[: min(count, int((weights > 0).sum()))]
            assert torch.equal(ids, expected)
            assert torch.equal(times, arrivals[expected]) and torch.equal(told, noise(key, V)[expected])
            assert draw_counter(weights.unsqueeze(0), [key])[0].item() == ids[0]


def test_the_first_arrivals_of_torch_noise_are_those_of_its_draw() -> None:
    for V, count in [(1, 3), (700, 20)]:
        weights = torch.rand(V, generator=torch.Generator().manual_seed(V))
        source = TorchNoise(5, 3, torch.device("cpu"))
        source.skip(2, V)
        state = source.generator.get_state()
        ids, told, times = first_torch_arrivals(weights, state, count)
        assert torch.equal(source.generator.get_state(), state), "to look moves nothing"
        assert draw_torch(weights.unsqueeze(0), [source]).item() == ids[0]
        assert len(ids) == min(count, V) and torch.equal(times, times.sort().values)
        assert torch.equal(times, told / weights[ids])
