"""GPTQ and AWQ: integers of a few bits packed into int32, with a scale and a zero point for each group of inputs.

w = scale * (q - zero). Both have `X.qweight`, `X.qzeros` and `X.scales` [groups, N]. GPTQ packs qweight
[K * bits / 32, N] down the inputs, and `X.g_idx` [K] names the group of each; AWQ packs 4 bits [K, N / 8] along the
outputs, in the order of its kernels. GPTQ's first format stores a zero point less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from myserve.engine.weights.formats.recipe import (
    Read,
    Recipe,
    Recipes,
    finite,
    info_of,
    siblings,
    unpack_bits,
)
from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = ["awq_recipes", "gptq_recipes"]

_HALVES = (torch.float16, torch.bfloat16, torch.float32)
_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight outputs, the place of each in its int32


def gptq_recipes(described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> Recipes:
    """Return the recipe of every weight in GPTQ. Raises UnsupportedModelError for a version that is not known."""
    bits, size = described.get("bits"), described.get("group_size")
    layout = described.get("checkpoint_format") or "gptq"
    if bits not in (2, 3, 4, 8) or layout not in ("gptq", "gptq_v2") or not _is_size(size):
        raise UnsupportedModelError(
            f"the checkpoint is GPTQ of {bits} bits in groups of {size}, checkpoint_format {layout!r}; 2, 3, 4 and 8 "
            "bits in the formats gptq and gptq_v2 are read: take another, or the original with --quantize int8"
        )
    if any(changes for changes in (described.get("dynamic") or {}).values()):
        raise UnsupportedModelError(
            "the checkpoint is GPTQ with other settings for some layers (`dynamic`), which are not read; take the "
            "original with --quantize int8"
        )
    zero = 1 if layout == "gptq" else 0
    recipes: Recipes = {}
    for module in siblings(tensors, "qweight"):
        name = f"{module}.weight"
        packed = _matrix(tensors, f"{module}.qweight", name)
        inputs, outputs = packed[0] * 32 // bits, packed[1]
        groups = _groups(inputs, size, name)
        info_of(tensors, f"{module}.scales", name, _HALVES, (groups, outputs))
        info_of(tensors, f"{module}.qzeros", name, (torch.int32,), (groups, -(-outputs * bits // 32)))
        parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
        if f"{module}.g_idx" in tensors:
            info_of(tensors, f"{module}.g_idx", name, (torch.int32, torch.int64), (inputs,))
            parts.append(f"{module}.g_idx")
        elif described.get("desc_act"):
            raise BadCheckpointError(f"{name} has no {module}.g_idx, which desc_act needs")
        decode = partial(_decode_gptq, module, bits, zero, inputs // groups, f"{module}.g_idx" in tensors)
        recipes[name] = Recipe((outputs, inputs), tuple(parts), decode)
    return recipes


def _decode_gptq(
    module: str, bits: int, zero: int, size: int, has_order: bool, read: Read, dtype: torch.dtype
) -> Tensor:
    packed, scales = read(f"{module}.qweight"), finite(read, f"{module}.scales")
    inputs, outputs = packed.shape[0] * 32 // bits, packed.shape[1]
    zeros = unpack_bits(read(f"{module}.qzeros"), bits, outputs) + zero  # [groups, N]
    group = read(f"{module}.g_idx").long() if has_order else torch.arange(inputs) // size  # [K]
    if group.min() < 0 or group.max() >= len(scales):
        raise BadCheckpointError(f"{module}.g_idx names a group that {module}.scales has not")
    values = unpack_bits(packed.T.contiguous(), bits, inputs)  # [N, K]
    # in float32: a difference of integers is exact, and the product is rounded once more
    return ((values - zeros.T[:, group]).float() * scales.T[:, group]).to(dtype)


def awq_recipes(described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> Recipes:
    """Return the recipe of every weight in AWQ. Raises UnsupportedModelError for a version that is not known."""
    bits, size = (
        described.get("bits", described.get("w_bit")),
        described.get("group_size", described.get("q_group_size")),
    )
    version = str(described.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not _is_size(size) or described.get("zero_point", True) is not True:
        raise UnsupportedModelError(
            f"the checkpoint is AWQ of {bits} bits in groups of {size}, version {version!r}, zero_point "
            f"{described.get('zero_point')}; 4 bits of version gemm with zero points are read: take another, or the "
            "original with --quantize int8"
        )
    recipes: Recipes = {}
    for module in siblings(tensors, "qweight"):
        name = f"{module}.weight"
        inputs, packed = _matrix(tensors, f"{module}.qweight", name)
        groups = _groups(inputs, size, name)
        info_of(tensors, f"{module}.scales", name, _HALVES, (groups, packed * 8))
        info_of(tensors, f"{module}.qzeros", name, (torch.int32,), (groups, packed))
        parts = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        recipes[name] = Recipe((packed * 8, inputs), parts, partial(_decode_awq, module, inputs // groups))
    return recipes


def _decode_awq(module: str, size: int, read: Read, dtype: torch.dtype) -> Tensor:
    values, zeros = (_awq_integers(read(f"{module}.{part}")) for part in ("qweight", "qzeros"))
    scales = finite(read, f"{module}.scales").T.repeat_interleave(size, 1)  # [N, K]
    return ((values.T - zeros.T.repeat_interleave(size, 1)).float() * scales).to(dtype)


def _awq_integers(packed: Tensor) -> Tensor:
    """[R, N / 8] int32 -> [R, N]."""
    rows, words = packed.shape
    in_kernels_order = unpack_bits(packed, 4, words * 8).view(rows, words, 8)
    return in_kernels_order[..., list(_AWQ_COLUMNS)].reshape(rows, words * 8)


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and (size == -1 or size > 0)


def _matrix(tensors: Mapping[str, TensorInfo], packed: str, name: str) -> tuple[int, int]:
    info = info_of(tensors, packed, name, (torch.int32,))
    if len(info.shape) != 2:
        raise BadCheckpointError(f"{packed} has the shape {info.shape}, and is no matrix")
    return info.shape[0], info.shape[1]


def _groups(inputs: int, size: Any, name: str) -> int:
    if size != -1 and inputs % size:
        raise BadCheckpointError(f"{name} has {inputs} inputs, which groups of {size} do not divide")
    return 1 if size == -1 else int(inputs // size)
