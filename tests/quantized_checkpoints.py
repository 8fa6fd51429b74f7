"""Checkpoints in the formats that others publish, written from each format's definition, bit by bit.

An encoder takes a weight [N, K] and returns the tensors that stand for it, by the end of their names, and the weight
that they stand for, in float32. The integers and scales are made first, so that nothing here decodes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import make_tiny_model
from myserve.engine.weights.formats.recipe import FP4

__all__ = ["FORMATS", "GROUP", "pack", "write_quantized"]

GROUP = 16
Encoded = tuple[dict[str, Tensor], Tensor]
NF4 = torch.linspace(-1.0, 1.0, 16)  # a table is a table: a checkpoint brings its own


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack rows of unsigned integers into int32, lowest bits first: [R, n] -> [R, ceil(n * bits / 32)]."""
    rows = []
    for row in values.tolist():
        stream = sum(value << (bits * i) for i, value in enumerate(row))
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def _integers(weight: Tensor, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers [N, K], zero points and scales [N, groups] that are near a weight's."""
    generator = torch.Generator().manual_seed(seed)
    groups = weight.unflatten(1, (-1, GROUP))
    zeros = torch.randint(1, 1 << bits, groups.shape[:2], generator=generator)
    scales = (groups.abs().amax(2) * 2 / ((1 << bits) - 1)).half()
    q = (groups / scales.float().unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, (1 << bits) - 1)
    return q.flatten(1).long(), zeros, scales


def _by_group(q: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    return (q - zeros[:, group]).float() * scales.float()[:, group]


def gptq(bits: int, *, less_one: bool, ordered: bool) -> Callable[[Tensor], Encoded]:
    def encode(weight: Tensor) -> Encoded:
        q, zeros, scales = _integers(weight, bits)
        inputs = weight.shape[1]
        group = torch.arange(inputs) // GROUP
        if ordered:
            group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
        parts = {
            "qweight": pack(q, bits).T.contiguous(),
            "qzeros": pack((zeros - int(less_one)).T, bits),
            "scales": scales.T.contiguous(),
            "g_idx": group.int(),
        }
        return parts, _by_group(q, zeros, scales, group)

    return encode


def awq(weight: Tensor) -> Encoded:
    q, zeros, scales = _integers(weight, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the nibbles of an int32, from the lowest: these of eight outputs

    def packed(values: Tensor) -> Tensor:  # [R, N]
        return pack(values.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    parts = {"qweight": packed(q.T), "qzeros": packed(zeros.T), "scales": scales.T.contiguous()}
    return parts, _by_group(q, zeros, scales, torch.arange(weight.shape[1]) // GROUP)


def _float8(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    stored = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return stored, stored.float() * scales


def fp8_block(weight: Tensor) -> Encoded:
    """Blocks of 24 x 20, of which the last of each row and column are cut."""
    scales = torch.rand(-(-weight.shape[0] // 24), -(-weight.shape[1] // 20)) + 0.5
    by_value = torch.empty_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            by_value[i, j] = scales[i // 24, j // 20]
    stored, expected = _float8(weight, by_value)
    return {"weight": stored, "weight_scale_inv": scales}, expected


def fp8_tensor(weight: Tensor) -> Encoded:
    stored, expected = _float8(weight, torch.tensor(0.37))
    return {"weight": stored, "weight_scale": torch.tensor(0.37), "input_scale": torch.tensor(1.5)}, expected


def fp8_rows(weight: Tensor) -> Encoded:
    scales = torch.rand(len(weight), 1).bfloat16() + 0.5
    stored, expected = _float8(weight, scales.float())
    return {"weight": stored, "weight_scale": scales}, expected


def int8_rows(weight: Tensor) -> Encoded:
    """bitsandbytes' 8 bits."""
    largest = weight.abs().amax(1)
    stored = (weight / largest.unsqueeze(1) * 127).round().to(torch.int8)
    parts = {"weight": stored, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, stored.float() * (largest / 127).unsqueeze(1)


def four_bits(weight: Tensor) -> Encoded:
    """bitsandbytes' 4 bits, with scales as they are."""
    size, values = 64, weight.flatten().unflatten(0, (-1, 64))
    scales = values.abs().amax(1)
    codes = (values / scales.unsqueeze(1)).unsqueeze(2).sub(NF4).abs().argmin(2).flatten()
    packed = (codes[0::2] * 16 + codes[1::2]).to(torch.uint8).unsqueeze(1)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts = {
        "weight": packed,
        "weight.absmax": scales,
        "weight.quant_map": NF4.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return parts, (NF4[codes].unflatten(0, (-1, size)) * scales.unsqueeze(1)).view(weight.shape)


def packed_int(bits: int, *, symmetric: bool) -> Callable[[Tensor], Encoded]:
    """compressed-tensors' integers by group."""

    def encode(weight: Tensor) -> Encoded:
        q, zeros, scales = _integers(weight, bits)
        if symmetric:
            zeros = torch.full_like(zeros, 1 << (bits - 1))
        parts = {
            "weight_packed": pack(q, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack(zeros.T, bits).T.contiguous()
        return parts, _by_group(q, zeros, scales, torch.arange(weight.shape[1]) // GROUP)

    return encode


def _codes(values: Tensor) -> Tensor:
    return values.unsqueeze(-1).sub(torch.tensor(FP4)).abs().argmin(-1)


def nvfp4(weight: Tensor) -> Encoded:
    whole = torch.tensor([3.0])
    groups = weight.unflatten(1, (-1, 16))
    scales = (groups.abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
    used = (scales.float() / whole).unsqueeze(2)
    codes = _codes(groups / used.clamp(min=1e-9)).flatten(1)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}
    return parts, (torch.tensor(FP4)[codes].unflatten(1, (-1, 16)) * used).flatten(1)


def _scheme(layout: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


_GROUPS = {"type": "int", "strategy": "group", "group_size": GROUP}
# name -> what config.json says, and the encoder of a linear layer's weight
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Encoded]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [24, 20]}, fp8_block),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, fp8_rows),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
        gptq(4, less_one=True, ordered=True),
    ),
    "gptq-3": ({"quant_method": "gptq", "bits": 3, "group_size": GROUP}, gptq(3, less_one=True, ordered=False)),
    "gptq_v2-8": (
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        gptq(8, less_one=False, ordered=False),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "bitsandbytes-8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8_rows),
    "bitsandbytes-4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, four_bits),
    "w4a16": (_scheme("pack-quantized", num_bits=4, symmetric=True, **_GROUPS), packed_int(4, symmetric=True)),
    "w8a16-zeros": (
        _scheme("pack-quantized", num_bits=8, symmetric=False, **_GROUPS),
        packed_int(8, symmetric=False),
    ),
    "float-quantized": (
        _scheme("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
        fp8_rows,
    ),
    "nvfp4": (
        _scheme("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4,
    ),
}  # fmt: skip


def write_quantized(name: str, folder: Path, arch: str = "llama") -> tuple[Path, Path]:
    """Write a tiny bfloat16 model in a format, and another of the weights that it stands for; return both folders."""
    described, encode = FORMATS[name]
    plain = make_tiny_model(arch, folder / "plain", dtype=torch.bfloat16)
    quantized = Path(shutil.copytree(plain, folder / "quantized"))
    torch.manual_seed(1)
    tensors, expected = {}, {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        if key.endswith("proj.weight"):
            parts, decoded = encode(tensor.float())
            tensors |= {f"{key.removesuffix('weight')}{part}": value for part, value in parts.items()}
            expected[key] = decoded.bfloat16()
        else:
            tensors[key] = expected[key] = tensor
    save_file(expected, plain / "model.safetensors", {"format": "pt"})
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, quantized / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = described
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, plain
