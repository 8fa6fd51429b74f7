"""compressed-tensors: FP8, integers of 2, 4 or 8 bits, NVFP4 and MXFP4, each layer by the group that names it.

For a layer X: `X.weight` (8 bits) or `X.weight_packed`, `X.weight_scale`, and by scheme `X.weight_zero_point`,
`X.weight_g_idx`, `X.weight_shape` or `X.weight_global_scale`. Activations stay as they are, whatever the scheme says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from myserve.engine.weights.formats.float8 import FLOAT8, grid_of, scaled
from myserve.engine.weights.formats.recipe import (
    Read,
    Recipe,
    Recipes,
    finite,
    info_of,
    part_of,
    siblings,
    unpack_bits,
    unpack_fp4,
)
from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = ["compressed_tensors_recipes"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)  # fmt: skip


def compressed_tensors_recipes(
    described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read
) -> Recipes:
    """Return the recipe of every weight. Raises UnsupportedModelError for a scheme that is not read."""
    groups = _groups(described)
    recipes: Recipes = {}
    for last in ("weight_packed", "weight_scale"):
        for module in siblings(tensors, last):
            if f"{module}.weight" not in recipes:
                layout, weights = _group_of(module, groups)
                recipes[f"{module}.weight"] = _recipe(module, layout, weights, tensors, read)
    return recipes


def _groups(described: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str, Mapping[str, Any]]]:
    """Return of each group what it is for, its format, and how its weights are quantised."""
    found = []
    for group in (described.get("config_groups") or {}).values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            layout = group.get("format") or described.get("format")
            found.append((tuple(group.get("targets") or ("Linear",)), str(layout), weights))
    strange = sorted({layout for _, layout, _ in found if layout not in _FORMATS})
    sparse = (described.get("sparsity_config") or {}).get("format", "dense")
    transforms = (described.get("transform_config") or {}).get("config_groups")
    if not found or strange or sparse != "dense" or transforms:
        what = (
            "with sparse weights"
            if sparse != "dense"
            else "with transforms of activations"
            if transforms
            else ""
        )
        raise UnsupportedModelError(
            "the checkpoint is compressed-tensors "
            + (what or (f"in the format {', '.join(strange)}" if strange else "without a group of layers"))
            + f"; {', '.join(_FORMATS)} are read: take another, or the original with --quantize int8"
        )
    return found


def _group_of(
    module: str, groups: list[tuple[tuple[str, ...], str, Mapping[str, Any]]]
) -> tuple[str, Mapping[str, Any]]:
    """Return the format and scheme of a layer: a group that names it counts before one for all linear layers."""
    for targets, layout, weights in groups:
        if any(_names(target, module) for target in targets):
            return layout, weights
    for_all = [(layout, weights) for targets, layout, weights in groups if "Linear" in targets]
    if len(for_all) != 1:
        raise BadCheckpointError(f"{module} has scales, and no group of quantization_config is for it")
    return for_all[0]


def _names(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _recipe(
    module: str, layout: str, weights: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read
) -> Recipe:
    name = f"{module}.weight"
    if layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return _fp4(module, 16 if layout.startswith("nv") else 32, tensors)
    if layout == "pack-quantized":
        return _packed(module, weights, tensors, read)
    if weights.get("num_bits") != 8:
        raise UnsupportedModelError(
            f"{name} is {layout} of {weights.get('num_bits')} bits, and 8 are read: take another, or the original with "
            "--quantize int8"
        )
    info = part_of(tensors, name, name)
    scale = part_of(tensors, f"{name}_scale", name)
    if info.dtype not in (*FLOAT8, torch.int8):
        raise BadCheckpointError(f"{name} is {info.dtype}, which {layout} is not")
    grid = grid_of(name, info, f"{name}_scale", scale, _block(weights, info))
    parts = [name, f"{name}_scale"]
    if weights.get("symmetric", True) is not True:
        info_of(tensors, f"{name}_zero_point", name, (info.dtype,), scale.shape)
        parts.append(f"{name}_zero_point")
    return Recipe(info.shape, tuple(parts), partial(_decode_whole, name, grid, len(parts) == 3))


def _block(weights: Mapping[str, Any], info: TensorInfo) -> Any:
    """Return the values that share a scale: a block of rows and columns, or a group of a row."""
    strategy = weights.get("strategy")
    if strategy == "block":
        return weights.get("block_structure")
    if strategy == "group":
        return [1, weights.get("group_size")]
    return None


def _decode_whole(name: str, grid: tuple[int, int], has_zero: bool, read: Read, dtype: torch.dtype) -> Tensor:
    values = read(name)
    scales = finite(read, f"{name}_scale")
    if has_zero:
        zeros = scaled(torch.ones(values.shape), read(f"{name}_zero_point").float(), grid, torch.float32)
        values = values.float() - zeros
    return scaled(values, scales, grid, dtype)


# --- 4 bits and fewer, packed --------------------------------------------------------------------------------


def _packed(module: str, weights: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> Recipe:
    name, bits = f"{module}.weight", weights.get("num_bits")
    strategy, is_symmetric = weights.get("strategy"), weights.get("symmetric", True) is True
    if bits not in (2, 4, 8) or weights.get("type") != "int" or strategy not in ("group", "channel"):
        raise UnsupportedModelError(
            f"{name} is packed as {bits} bits of {weights.get('type')} by {strategy}; integers of 2, 4 and 8 bits by "
            "group or channel are read: take another, or the original with --quantize int8"
        )
    info_of(tensors, f"{name}_shape", name, (torch.int64, torch.int32), (2,))
    rows, columns = (int(n) for n in read(f"{name}_shape"))
    info_of(tensors, f"{name}_packed", name, (torch.int32,), (rows, -(-columns * bits // 32)))
    size = weights.get("group_size") if strategy == "group" else columns
    if not isinstance(size, int) or size < 1 or columns % size:
        raise BadCheckpointError(f"{name} has {columns} inputs, which groups of {size} do not divide")
    info_of(tensors, f"{name}_scale", name, _FLOATS, (rows, columns // size))
    parts = [f"{name}_{part}" for part in ("packed", "shape", "scale")]
    if not is_symmetric:
        info_of(tensors, f"{name}_zero_point", name, (torch.int32,), (-(-rows * bits // 32), columns // size))
        parts.append(f"{name}_zero_point")
    if f"{name}_g_idx" in tensors:
        info_of(tensors, f"{name}_g_idx", name, (torch.int32, torch.int64), (columns,))
        parts.append(f"{name}_g_idx")
    decode = partial(_decode_packed, name, bits, size, frozenset(parts), (rows, columns))
    return Recipe((rows, columns), tuple(parts), decode)


def _decode_packed(
    name: str,
    bits: int,
    size: int,
    parts: frozenset[str],
    shape: tuple[int, int],
    read: Read,
    dtype: torch.dtype,
) -> Tensor:
    rows, columns = shape
    scales = finite(read, f"{name}_scale")  # [N, groups]
    # stored unsigned, with half the range added, the zero points as well
    values, zeros = unpack_bits(read(f"{name}_packed"), bits, columns), torch.tensor(1 << (bits - 1))
    group = torch.arange(columns) // size
    if f"{name}_g_idx" in parts and (order := read(f"{name}_g_idx").long()).min() >= 0:  # -1: there is none
        group = order
        if group.max() >= scales.shape[1]:
            raise BadCheckpointError(f"{name}_g_idx names a group that {name}_scale has not")
    if f"{name}_zero_point" in parts:
        packed = read(f"{name}_zero_point").T.contiguous()
        zeros = unpack_bits(packed, bits, rows).T[:, group]
    return ((values - zeros).float() * scales[:, group]).to(dtype)


def _fp4(module: str, size: int, tensors: Mapping[str, TensorInfo]) -> Recipe:
    name = f"{module}.weight"
    info = info_of(tensors, f"{name}_packed", name, (torch.uint8,))
    if len(info.shape) != 2 or info.shape[1] * 2 % size:
        raise BadCheckpointError(
            f"{name}_packed has the shape {info.shape}, and groups of {size} do not divide it"
        )
    rows, columns = info.shape[0], info.shape[1] * 2
    scales = (torch.float8_e4m3fn,) if size == 16 else (torch.uint8,)
    info_of(tensors, f"{name}_scale", name, scales, (rows, columns // size))
    parts = [f"{name}_packed", f"{name}_scale"]
    if size == 16:
        info_of(tensors, f"{name}_global_scale", name, (torch.float32,), (1,), ())
        parts.append(f"{name}_global_scale")
    return Recipe((rows, columns), tuple(parts), partial(_decode_fp4, name, size))


def _decode_fp4(name: str, size: int, read: Read, dtype: torch.dtype) -> Tensor:
    scales = finite(read, f"{name}_scale")
    if size == 16:
        scales = scales / finite(read, f"{name}_global_scale")
    return scaled(unpack_fp4(read(f"{name}_packed")), scales, (1, size), dtype)
