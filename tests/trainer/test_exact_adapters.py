"""A trainer's LoRA layers have the bits of the server that serves their adapter, and gradients to A and B.

The layers here are stand-ins with the attributes of PEFT's, and its plain forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.adapters import write_adapter, write_expert_adapter
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs
from runs import Asked, run

PROMPT = list(range(40, 75))
Tensors = Mapping[str, Tensor]


class LoraLayer(nn.Module):
    """What PEFT puts around a linear layer."""

    def __init__(self, base_layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(a.shape[1], len(a), bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(b.shape[1], len(b), bias=False)})
        self.lora_A["default"].weight = nn.Parameter(a)
        self.lora_B["default"].weight = nn.Parameter(b)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.5)})
        self.scaling = {"default": scale}
        self.active_adapters = ["default"]
        self.disable_adapters = self.merged = False
        self.use_dora = {"default": False}

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A["default"], self.lora_B["default"]
        y = self.base_layer(x)
        made = b(a(x.to(a.weight.dtype))) * self.scaling["default"]
        return (y + made).to(y.dtype)


class ParamWrapper(LoraLayer):
    """What PEFT puts around the experts of a layer, once for each parameter."""

    def __init__(self, base_layer: nn.Module, parameter: str, count: int, *rest: Any) -> None:
        super().__init__(base_layer, *rest)
        self.parameter_name, self.num_experts = parameter, count


def with_adapter(model: Any, folder: Path, scale: float = 2.0) -> Any:
    """Wrap the layers of a model that an adapter's files name."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in sorted(tensors):
        if not key.endswith("lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        pair = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        parent, _, own = name.removesuffix(".base_layer").rpartition(".")
        holder = model.get_submodule(parent)
        inner = getattr(holder, own)
        if own == "experts":
            parameter = "gate_up_proj" if name.endswith("base_layer") else "down_proj"
            count = model.config.num_experts
            setattr(holder, own, ParamWrapper(inner, parameter, count, *pair, scale))
        else:
            setattr(holder, own, LoraLayer(inner, *pair, scale))
    return model.eval()


def logprobs(model: Any, completion: list[int]) -> Tensor:
    ids = torch.tensor([PROMPT + completion])
    places = torch.arange(ids.shape[1])[None]
    logits = model(ids, attention_mask=torch.ones_like(ids), position_ids=places).logits
    return exact_logprobs(logits[0, len(PROMPT) - 1 : -1], ids[0, len(PROMPT) :])


@pytest.mark.parametrize("quantize", ["off", "int8"])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_a_lora_model_has_the_servers_bits_and_gradients(
    arch: str, quantize: Any, make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:  # fmt: skip
    """The adapter is float32, as PEFT keeps it, and the model bfloat16."""
    engine, folder = make_engine(arch, dtype="bfloat16", quantize=quantize), tiny_model(arch)
    if arch == "llama":
        adapter = write_adapter(tmp_path, folder, rank=5, alpha=10.0)
    else:
        adapter = write_expert_adapter(tmp_path, folder, one_by_one=False)
    engine.load_adapter("trained", adapter).result()
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    [[served]] = run(engine, [Asked(PROMPT, params, adapter="trained")])
    engine.unload_adapter("trained").result()
    wanted = [token.logprob for token in served.tokens]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    control = exact_forward(base.eval(), quantize=quantize)
    assert logprobs(control, served.ids).tolist() != wanted, "the control: without the adapter"
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = exact_forward(with_adapter(fresh, adapter), quantize=quantize)
    made = logprobs(model, served.ids)
    assert made.tolist() == wanted
    made.sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert trained and all(grad is not None and grad.abs().sum() > 0 for grad in trained.values())
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.disable_adapters = True
    assert logprobs(model, served.ids).tolist() == logprobs(control, served.ids).tolist()


def test_what_is_not_plain_lora_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model = with_adapter(model, write_adapter(tmp_path, tiny_model("llama"), targets=["q_proj"]))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.use_dora = {"default": True}
    with pytest.raises(ValueError, match="DoRA"):
        exact_forward(model)
    layer.use_dora, layer.lora_bias = {}, {"default": True}
    with pytest.raises(ValueError, match="biases"):
        exact_forward(model)
    layer.lora_bias = {}
    exact_forward(model)
    with pytest.raises(ValueError, match="adapter_names"):
        layer(torch.ones(1, 32), adapter_names=["default"])
