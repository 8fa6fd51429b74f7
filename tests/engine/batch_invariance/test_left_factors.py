"""Weights that a layer multiplies from the left itself: the product of rows, without the bias, in any company."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model_zoo import SERVED
from myserve.engine.batch_invariance.left_factors import HeadFactors, LeftFactor
from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.batch_invariance.patch import ExactLinear, make_exact
from myserve.engine.weights.lora.targets import find_targets
from myserve.engine.weights.plan import WeightNames
from myserve.engine.weights.readback import current_weights

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@each_dtype
def test_a_layers_weight_multiplies_columns_without_its_bias(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(70, 24).to(dtype), torch.randn(70).to(dtype)
    layer = ExactLinear(PackedWeight(weight, bias))
    x = torch.randn(1, 24, 33).to(dtype)
    out = layer.weight @ x
    torch.testing.assert_close(out, weight @ x)
    assert type(out) is torch.Tensor and torch.equal(out, torch.matmul(layer.weight, x))
    rows = layer(x.transpose(1, 2)) - bias
    assert torch.allclose(out.transpose(1, 2), rows, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0.02)
    assert torch.equal(layer.bias, bias.float())
    alone = torch.cat([layer.weight @ x[..., t : t + 1] for t in range(33)], dim=-1)
    assert torch.equal(alone, out)


def test_a_weight_tells_its_shape_and_type_and_follows_new_values() -> None:
    layer, x = ExactLinear(PackedWeight(torch.eye(3), torch.ones(3))), torch.randn(1, 3, 2)
    assert layer.weight.shape == (3, 3) and layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight @ x, x)
    layer.replace(PackedWeight(2 * torch.eye(3)))
    assert torch.equal(layer.weight @ x, 2 * x)
    assert not isinstance(layer.weight.bfloat16(), LeftFactor), "what is made of it has no product"


@each_dtype
def test_heads_have_a_product_each(dtype: torch.dtype) -> None:
    weights, x = torch.randn(3, 20, 7).to(dtype), torch.randn(3, 2, 7, 9).to(dtype)
    factors = HeadFactors.of([PackedWeight(weight) for weight in weights])
    out = factors[:, None] @ x
    torch.testing.assert_close(out, weights[:, None] @ x)
    assert torch.equal(factors[:, None] @ x[..., 4:5], out[..., 4:5])
    assert factors.shape == weights.shape and factors.dtype == dtype


@pytest.mark.parametrize("arch", ["jamba", "zamba"])
def test_a_model_holds_them_packed_reads_them_back_and_gives_them_no_adapter(arch: str) -> None:
    kind, config = SERVED[arch]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()
    names, before = WeightNames.of(model), {k: v.clone() for k, v in model.state_dict().items()}
    plain = model.num_parameters()
    report, _ = make_exact(model)
    assert report.mode == "on" and not any(
        "x_proj" in name or "dt_proj.w" in name for name in model.state_dict()
    )
    assert model.num_parameters() < plain
    read = dict(current_weights(model, names))
    assert read.keys() == before.keys() and all(torch.equal(read[name], before[name]) for name in before)
    assert not any(name.endswith("dt_proj") for name in find_targets(model))
