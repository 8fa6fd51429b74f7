"""What llama.cpp's converter does to tensors is undone: each function against an order of rows written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from myserve.engine.weights.formats.from_gguf.undo import (
    columns_by_key_head,
    conv_weight,
    decay_log,
    halves_of_heads,
    joined_by_key_head,
    minus_one,
    rows_by_key_head,
    values_by_key_head,
)
from myserve.errors import BadCheckpointError

# two key heads of one number, three value heads each, of two numbers
CONFIG = SimpleNamespace(
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=1, linear_value_head_dim=2
)
# a file has the first value head of each key head, then the second of each: 00 10 01 11 02 12
TILED = torch.tensor([0.0, 10.0, 1.0, 11.0, 2.0, 12.0])
GROUPED = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])


def wide(heads: torch.Tensor) -> torch.Tensor:
    """Two rows a head: its number, and a half more."""
    return torch.stack([heads, heads + 0.5], dim=1).flatten().unsqueeze(1)  # [12, 1]


def test_value_heads_come_back_to_their_key_head() -> None:
    assert torch.equal(rows_by_key_head(TILED, CONFIG), GROUPED)
    assert torch.equal(values_by_key_head(wide(TILED), CONFIG), wide(GROUPED))
    keys = torch.tensor([[-1.0], [-2.0], [-3.0], [-4.0]])  # queries and keys stay
    assert torch.equal(
        values_by_key_head(torch.cat([keys, wide(TILED)]), CONFIG), torch.cat([keys, wide(GROUPED)])
    )
    assert torch.equal(columns_by_key_head(wide(TILED).T, CONFIG), wide(GROUPED).T)
    with pytest.raises(BadCheckpointError, match="no 6 heads of 2"):
        values_by_key_head(wide(TILED)[:11], CONFIG)


def test_projections_are_joined_key_head_by_key_head() -> None:
    queries, keys = torch.tensor([[100.0], [200.0]]), torch.tensor([[101.0], [201.0]])
    values, gates = wide(GROUPED), -wide(GROUPED)
    made = joined_by_key_head([torch.cat([queries, keys, values]), gates], CONFIG)
    first = [queries[:1], keys[:1], values[:6], gates[:6]]
    second = [queries[1:], keys[1:], values[6:], gates[6:]]
    assert torch.equal(made, torch.cat(first + second))


def test_every_decay_of_bfloat16_comes_back() -> None:
    """All finite numbers between 2^-8 and 8, both signs: what models have, and where the file can tell them apart."""
    bits = torch.arange(0x3B80, 0x4100, dtype=torch.int32)
    numbers = bits.to(torch.int16).view(torch.bfloat16).float()
    numbers = torch.cat([numbers, -numbers])
    stored = -numbers.exp()
    assert torch.equal(decay_log(stored, None), numbers)
    # control: a logarithm in float32 alone gives others
    assert not torch.equal(torch.log(-stored), numbers)


def test_a_decay_that_is_not_below_0_is_refused() -> None:
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(BadCheckpointError, match="below 0"):
            decay_log(torch.tensor([-1.0, wrong]), None)


def test_norms_above_a_bound_come_back_in_all_their_bits() -> None:
    bits = torch.arange(0x3800, 0x4000, dtype=torch.int32)  # 2^-15 to 2
    weights = bits.to(torch.int16).view(torch.bfloat16).float()
    weights = torch.cat([weights, -weights])
    assert torch.equal(minus_one(weights + 1, None).bfloat16().float(), weights)


def test_a_convolution_gets_its_dimension_once() -> None:
    assert conv_weight(torch.ones(6, 4), None).shape == (6, 1, 4)
    assert conv_weight(torch.ones(6, 1, 4), None).shape == (6, 1, 4)


def test_halves_of_heads_lie_behind_one_another() -> None:
    rows = torch.tensor(
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    )  # two heads of four: n-th of both halves in pairs
    assert torch.equal(halves_of_heads(lambda config: 2)(rows, None), torch.arange(8.0))
    with pytest.raises(BadCheckpointError, match="no 3 heads"):
        halves_of_heads(lambda config: 3)(rows, None)
