"""Exponentials that are skipped leave torch's generator with the bits that drawing them would leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from myserve.core.mersenne import torch_state
from myserve.core.mersenne.torch_state import skip_exponentials, skip_words
from myserve.core.noise import TorchNoise

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    before=st.integers(0, 1300),
    count=st.integers(0, 40),
    size=st.integers(1, 700),
)
def test_skipped_exponentials_are_as_drawn(seed: int, before: int, count: int, size: int) -> None:
    drawn, skipped = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    for generator in (drawn, skipped):
        torch.empty(before, dtype=torch.int32).random_(generator=generator)
    for _ in range(count):
        torch.empty(size).exponential_(generator=drawn)
    assert skip_exponentials(skipped, count, size)
    assert torch.equal(drawn.get_state(), skipped.get_state())


@pytest.mark.parametrize("count", [1, 623, 624, 625, 1248, 1249])
@pytest.mark.parametrize("before", [0, 1, 623, 624])
def test_at_the_ends_of_blocks_too(before: int, count: int) -> None:
    drawn, skipped = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    for generator in (drawn, skipped):
        torch.empty(before, dtype=torch.int32).random_(generator=generator)
    torch.empty(count, dtype=torch.int32).random_(generator=drawn)
    skip_words(skipped, count)
    assert torch.equal(drawn.get_state(), skipped.get_state())


def test_noise_behind_prior_tokens_has_the_bits_of_noise_that_was_drawn() -> None:
    drawn, skipped = TorchNoise(5, 2, CPU), TorchNoise(5, 2, CPU)
    for _ in range(9):
        drawn.exponentials(1000)
    skipped.skip(9, 1000)
    assert torch.equal(drawn.exponentials(1000), skipped.exponentials(1000))


def test_control_where_torch_draws_in_another_way_nothing_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds differ in how many words an exponential takes; then they are drawn, with the same bits."""
    monkeypatch.setattr(torch_state, "_WORDS_OF_ONE", 3)
    torch_state._draws_two_words_each.cache_clear()
    try:
        generator = torch.Generator().manual_seed(1)
        before = generator.get_state()
        assert not skip_exponentials(generator, 2, 100) and torch.equal(generator.get_state(), before)
        drawn, skipped = TorchNoise(5, 0, CPU), TorchNoise(5, 0, CPU)
        drawn.exponentials(100)
        skipped.skip(1, 100)
        assert torch.equal(drawn.exponentials(100), skipped.exponentials(100))
    finally:
        torch_state._draws_two_words_each.cache_clear()
