"""A matrix that a module multiplies by itself is batch-invariant, exchanged with the weights, and read back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import make_tiny_model
from myserve.core.params import SamplingParams
from myserve.engine.batch_invariance import patch
from myserve.engine.batch_invariance.own_matrices import ExactWeight, own_matrices
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.snapshot import weights_checksum
from myserve.errors import UnsupportedModelError
from runs import Asked, run

SMALL = EngineConfig(num_blocks=32)
ASKED = [Asked([5, 7, 100 + i, 41] * (1 + i), SamplingParams(max_tokens=8, seed=i)) for i in range(3)]


class Connection(nn.Module):
    """Like HY-V4's hyper-connection: a matrix and a vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.randn(3, 40))
        self.table = nn.Parameter(torch.randn(5, 40))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x + self.table[1], self.fn.float()) * self.scale


def test_what_is_multiplied_is_found_by_what_the_forward_does() -> None:
    assert own_matrices(Connection()) == ["fn"]
    assert own_matrices(nn.Embedding(3, 4)) == own_matrices(nn.LayerNorm(4)) == []


@torch.inference_mode()
@pytest.mark.parametrize(
    "cast", [lambda w: w.type(torch.float32), lambda w: w.float(), lambda w: w.to(torch.float32)]
)
def test_a_routers_weight_that_is_cast_to_float32_has_a_product_of_it(cast: Any) -> None:
    """DeepSeek-V3's router does so, whose checkpoints are in half precision."""
    torch.manual_seed(0)
    plain, x = torch.randn(9, 40).bfloat16(), torch.randn(70, 40)
    weight = ExactWeight.of(plain, None)
    out = F.linear(x, cast(weight))
    torch.testing.assert_close(out, F.linear(x, plain.float()))
    assert torch.equal(torch.cat([F.linear(row[None], cast(weight)) for row in x]), out)
    assert cast(weight) is cast(weight)  # packed once
    assert F.linear(x.bfloat16(), weight).dtype == torch.bfloat16


@torch.inference_mode()
def test_what_is_computed_of_such_a_weight_is_a_plain_tensor() -> None:
    plain = torch.randn(9, 40)
    weight = ExactWeight.of(plain, None)
    assert type(weight[:3]) is type(weight * 2) is torch.Tensor
    torch.testing.assert_close(
        F.linear(torch.ones(2, 40), weight[:3]), F.linear(torch.ones(2, 40), plain[:3])
    )


@pytest.mark.parametrize(("kind", "dtype"), [("hy_v4", torch.bfloat16), ("jetmoe", torch.float32)], ids=str)
def test_new_weights_are_those_of_a_fresh_engine_and_are_read_back(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    paths = [make_tiny_model(kind, tmp_path / str(seed), seed=seed, dtype=dtype) for seed in (0, 1)]
    engines = [Engine.from_pretrained(str(path), SMALL) for path in paths]
    numbers: Callable[[Engine], Any] = lambda engine: [c.numbers for [c] in run(engine, ASKED)]  # noqa: E731
    try:
        before, wanted = (numbers(engine) for engine in engines)
        report = engines[0].update_weights(str(paths[1])).result(60)
        assert numbers(engines[0]) == wanted != before
        assert report.checksum == weights_checksum(paths[1])
        read = [asyncio.run(engine.weight_checksums()) for engine in engines]
        assert read[0] == read[1]
    finally:
        for engine in engines:
            engine.shutdown()


@pytest.mark.parametrize(
    ("kind", "function", "names"),
    [("hy_v4", "pack_own_matrices", "HYV4"), ("jetmoe", "_pack_grouped_linears", "JetMoeParallelExperts")],
)
def test_control_a_product_that_is_pytorchs_is_refused_by_name(
    kind: str, function: str, names: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch, function, lambda *_: 0)
    with pytest.raises(UnsupportedModelError, match=rf"other bits in another batch: .*{names}") as caught:
        Engine.from_pretrained(str(tiny_model(kind)), SMALL)
    assert "--exact off" in str(caught.value) and "\n" not in str(caught.value)
    engine = Engine.from_pretrained(str(tiny_model(kind)), EngineConfig(num_blocks=32, exact="off"))
    engine.shutdown()
    assert not engine.exactness["rows_are_independent"]
