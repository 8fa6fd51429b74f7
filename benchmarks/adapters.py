"""Adapters in PEFT's format with random A and B, written without PEFT: for benchmarks and tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layers_of(model: Path) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of each linear layer of a folder's model, by name; the output layer is none of them."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    sizes: dict[str, tuple[int, int]] = {}
    for name, module in made.named_modules():
        if module is made.get_output_embeddings():
            continue
        if isinstance(module, nn.Linear):
            sizes[name] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            sizes[name] = module.weight.shape[0], module.weight.shape[1]
    return sizes


def experts_of(model: Path) -> dict[str, tuple[int, int, int]]:
    """Return experts, inputs and outputs of each parameter of experts of a folder's model, by name."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return {
        name: (parameter.shape[0], parameter.shape[2], parameter.shape[1])
        for name, parameter in made.named_parameters()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    }


def write_expert_adapter(
    folder: Path, model: Path, *, one_by_one: bool, seed: int = 0, rank: int = 4, size: float = 0.2
) -> Path:
    """Write an adapter of a mixture's experts: as PEFT wraps all of a layer, or the same numbers expert by expert."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    is_mixtral = AutoConfig.from_pretrained(model).model_type == "mixtral"
    *gates, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, (count, inner, outer) in experts_of(model).items():
        module, _, parameter = f"base_model.model.{name}".rpartition(".")
        a = size * torch.randn(count, rank, inner, generator=generator)
        b = size * torch.randn(count, outer, rank, generator=generator)
        if not one_by_one:
            prefix = module + (".base_layer" if parameter == "gate_up_proj" else "")
            tensors[f"{prefix}.lora_A.weight"] = a.reshape(count * rank, inner)
            tensors[f"{prefix}.lora_B.weight"] = b.permute(1, 2, 0).reshape(outer, rank * count)
            continue
        if is_mixtral:
            module = module.replace(".mlp.", ".block_sparse_moe.")
        parts = gates if parameter == "gate_up_proj" else (down,)
        for expert in range(count):
            for part, own in zip(parts, b[expert].chunk(len(parts)), strict=True):
                tensors[f"{module}.{expert}.{part}.lora_A.weight"] = a[expert].clone()
                tensors[f"{module}.{expert}.{part}.lora_B.weight"] = own.contiguous()
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    told: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_parameters": parameters,
    }
    if one_by_one:
        told |= {"target_parameters": None, "target_modules": [*gates, down]}
    return _written(folder, tensors, told)


def _written(folder: Path, tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def write_adapter(
    folder: Path,
    model: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    size: float = 0.2,
    **config: Any,
) -> Path:
    """Write an adapter of random A and B; `targets`: ends of names, by default every linear layer's."""
    generator = torch.Generator().manual_seed(seed)
    layers = layers_of(model)
    targets = sorted({name.rpartition(".")[2] for name in layers}) if targets is None else targets
    tensors: dict[str, torch.Tensor] = {}
    for name, (inner, outer) in layers.items():
        if name.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = size * torch.randn(rank, inner, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = size * torch.randn(outer, rank, generator=generator)
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.05,
        "target_modules": list(targets), "bias": "none", "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "rank_pattern": {}, "alpha_pattern": {}, "base_model_name_or_path": str(model),
    } | config  # fmt: skip
    return _written(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()}, told)
