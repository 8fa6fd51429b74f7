"""LoRA products by adapter: each row's bits are those of two packed products of its own, on every unit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from myserve.engine.batch_invariance import low_rank
from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.batch_invariance.low_rank import AdapterRows, AdapterSlots, LowRankLayer, LowRankWeights
from myserve.engine.kernels.gemm import linear_kernel
from myserve.engine.kernels.lora.products import lora_kernel
from myserve.engine.kernels.tiles import product_unit

UNITS = [(torch.float32, None), (torch.bfloat16, "lanes"), (torch.bfloat16, None)]
SHAPES = [(64, 96, 8), (50, 70, 5), (256, 130, 100), (40, 16, 33)]  # K, N, rank


@pytest.fixture(params=UNITS, ids=str)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """An element type, computed by one unit: both products, and those that judge them."""
    dtype, unit = request.param
    if unit is not None and unit != product_unit():
        monkeypatch.setattr(low_rank, "lora_kernel", lambda dtype: lora_kernel(dtype, unit))
        monkeypatch.setattr(
            "myserve.engine.batch_invariance.linear.linear_kernel", lambda dtype: linear_kernel(dtype, unit)
        )
    return dtype


def by_definition(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y [1, N] + scale * B(A(x [1, K])): four roundings to the dtype."""
    product = PackedWeight(b)(PackedWeight(a)(x))
    return y + (product.float() * scale).to(y.dtype)


@pytest.mark.parametrize(("inner", "columns", "rank"), SHAPES)
def test_each_row_has_the_bits_that_it_has_alone(
    unit: torch.dtype, inner: int, columns: int, rank: int
) -> None:
    torch.manual_seed(0)
    slots = AdapterSlots()
    slots.make_room(9, rank + 32)
    layer = LowRankLayer(slots, inner, columns, unit)
    weights = {
        slot: (torch.randn(rank, inner).to(unit), torch.randn(columns, rank).to(unit), scale)
        for slot, scale in ((0, 0.3), (4, -2.0), (9, 1e-3))
    }
    for slot, each in weights.items():
        layer.put(slot, [LowRankWeights.of(*each)])
    of_row = [(-1, 0, 4, 9, 0, 7)[i * i % 6] for i in range(71)]  # 7: an adapter without this layer
    x, y = torch.randn(1, 71, inner).to(unit), torch.randn(1, 71, 200).to(unit)
    y[0, 1, 0] = -0.0
    before = y.clone()
    rows = AdapterRows.of(80)
    rows.fill(of_row)
    with slots.passing(rows):
        layer.add(x, y[..., 3 : 3 + columns])
    assert torch.equal(y[..., :3], before[..., :3]) and torch.equal(
        y[..., 3 + columns :], before[..., 3 + columns :]
    )
    for row, slot in enumerate(of_row):
        own = before[0, row : row + 1, 3 : 3 + columns]
        wanted = by_definition(x[0, row : row + 1], own, *weights[slot]) if slot in weights else own
        assert torch.equal(y[0, row : row + 1, 3 : 3 + columns], wanted), (row, slot)


def test_a_pass_without_adapters_is_untouched_and_a_dropped_one_is_gone() -> None:
    slots = AdapterSlots()
    layer = LowRankLayer(slots, 8, 4, torch.float32)
    layer.put(0, [LowRankWeights.of(torch.ones(2, 8), torch.ones(4, 2), 1.0)])
    x, rows = torch.ones(3, 8), AdapterRows.of(3)
    rows.fill([-1, 0, -1])
    assert torch.equal(layer.add(x, torch.zeros(3, 4)), torch.zeros(3, 4))
    with slots.passing(rows):
        assert layer.add(x, torch.zeros(3, 4))[:, 0].tolist() == [0.0, 16.0, 0.0]
        assert slots.make_room(20, 200) and not slots.make_room(3, 4)
        layer.resize()
        assert layer.add(x, torch.zeros(3, 4))[:, 0].tolist() == [0.0, 16.0, 0.0]
        layer.drop(0)
        assert torch.equal(layer.add(x, torch.zeros(3, 4)), torch.zeros(3, 4))
