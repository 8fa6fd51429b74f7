"""bitsandbytes: 4-bit codes of a table with a scale for each block (NF4, FP4), or int8 with a scale for each row.

4 bits: `X.weight` uint8, two codes a byte, the *higher* half first; `X.weight.absmax`, a scale for each block,
itself in 8 bits where it is nested; `X.weight.quant_map`, the table; and a JSON of the rest. 8 bits:
`X.weight` int8 [N, K] and `X.SCB` [N], the largest magnitude of each row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from myserve.engine.weights.formats.recipe import Read, Recipe, Recipes, finite, info_of, part_of, siblings
from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = ["bitsandbytes_recipes"]

_STATE = "quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")


class _Blocks(NamedTuple):
    """Sizes from the JSON: the weight's shape, the values of a block, and of nested scales their own blocks."""

    shape: tuple[int, ...]
    size: int
    nested_size: int | None
    nested_offset: float


def bitsandbytes_recipes(
    described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read
) -> Recipes:
    """Return the recipe of every weight. Raises BadCheckpointError for one whose scales or table are missing."""
    recipes: Recipes = {}
    for module in siblings(tensors, "SCB"):
        name, scales = f"{module}.weight", f"{module}.SCB"
        rows, columns = _int8_shape(tensors, name)
        info_of(tensors, scales, name, (torch.float32,), (rows,))
        layout = f"{module}.weight_format"
        if layout in tensors and int(read(layout).reshape(-1)[0]) != 0:
            raise UnsupportedModelError(
                f"{name} lies in the order of a GPU's kernel (weight_format {int(read(layout).reshape(-1)[0])}); save "
                "the checkpoint with a newer bitsandbytes, which stores rows"
            )
        parts = (name, scales, *([layout] if layout in tensors else []))
        recipes[name] = Recipe((rows, columns), parts, partial(_decode_int8, name, scales))
    for state in [name for name in tensors if _STATE in name]:
        name, _, kind = state.partition(f".{_STATE}")
        if kind not in _KINDS:
            raise UnsupportedModelError(
                f"{name} is in bitsandbytes' {kind}; {' and '.join(_KINDS)} are read: take the original"
            )
        blocks = _blocks(state, read)
        parts = _parts_of_4_bits(name, blocks, tensors)
        recipes[name] = Recipe(blocks.shape, (*parts, state), partial(_decode_4_bits, name, blocks))
    return recipes


def _int8_shape(tensors: Mapping[str, TensorInfo], name: str) -> tuple[int, int]:
    info = info_of(tensors, name, name, (torch.int8,))
    if len(info.shape) != 2:
        raise BadCheckpointError(f"{name} has the shape {info.shape}, and is no matrix")
    return info.shape[0], info.shape[1]


def _decode_int8(name: str, scales: str, read: Read, dtype: torch.dtype) -> Tensor:
    return (read(name).float() * (finite(read, scales) / 127).unsqueeze(1)).to(dtype)


def _blocks(state: str, read: Read) -> _Blocks:
    try:
        told = json.loads(bytes(read(state).tolist()))
        nested = told.get("nested_blocksize")
        blocks = _Blocks(
            tuple(int(n) for n in told["shape"]),
            int(told["blocksize"]),
            None if nested is None else int(nested),
            float(told.get("nested_offset") or 0.0),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpointError(f"{state} is not the description that bitsandbytes writes") from error
    if (
        min(blocks.shape, default=0) < 1
        or blocks.size < 2
        or (nested is not None and blocks.nested_size == 0)
    ):
        raise BadCheckpointError(f"{state} describes no weight: {blocks}")
    return blocks


def _parts_of_4_bits(name: str, blocks: _Blocks, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    count = math.prod(blocks.shape)
    packed = part_of(tensors, name, name)
    if packed.dtype != torch.uint8 or math.prod(packed.shape) != -(-count // 2):
        raise BadCheckpointError(f"{name} is {packed.shape} of {packed.dtype}, not {count} codes of 4 bits")
    scales = -(-count // blocks.size)
    info_of(tensors, f"{name}.quant_map", name, (torch.float32,), (16,))
    parts = [name, f"{name}.absmax", f"{name}.quant_map"]
    if blocks.nested_size is None:
        info_of(tensors, f"{name}.absmax", name, (torch.float32,), (scales,))
        return tuple(parts)
    info_of(tensors, f"{name}.absmax", name, (torch.uint8,), (scales,))
    info_of(tensors, f"{name}.nested_absmax", name, (torch.float32,), (-(-scales // blocks.nested_size),))
    info_of(tensors, f"{name}.nested_quant_map", name, (torch.float32,), (256,))
    return (*parts, f"{name}.nested_absmax", f"{name}.nested_quant_map")


def _decode_4_bits(name: str, blocks: _Blocks, read: Read, dtype: torch.dtype) -> Tensor:
    packed, count = read(name).flatten(), math.prod(blocks.shape)
    codes = torch.stack((packed >> 4, packed & 0xF), dim=-1).flatten()[:count]
    scales = read(f"{name}.absmax")
    if blocks.nested_size is not None:
        outer = finite(read, f"{name}.nested_absmax").repeat_interleave(blocks.nested_size)[: len(scales)]
        scales = finite(read, f"{name}.nested_quant_map")[scales.int()] * outer + blocks.nested_offset
    if not scales.isfinite().all():
        raise BadCheckpointError(f"{name}.absmax has values that are not finite")
    values = finite(read, f"{name}.quant_map")[codes.int()]
    return (values * scales.repeat_interleave(blocks.size)[:count]).to(dtype).view(blocks.shape)
