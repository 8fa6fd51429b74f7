"""gpt-oss' checkpoint: the experts of a layer in MXFP4, 32 numbers of 4 bits with one power of two.

`X_blocks` uint8 [E, R, K / 32, 16], two numbers a byte, the lower half first, and `X_scales` uint8 [E, R, K / 32], the
exponent plus 127. The model has X as [E, K, R].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from myserve.engine.weights.formats.recipe import Read, Recipe, Recipes, finite, info_of, unpack_fp4
from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadCheckpointError

__all__ = ["mxfp4_recipes"]

_BLOCKS, _SCALES = "_blocks", "_scales"


def mxfp4_recipes(described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> Recipes:
    """Return the recipe of every weight in MXFP4. Raises BadCheckpointError for blocks without their scales."""
    recipes: Recipes = {}
    for blocks in [name for name in tensors if name.endswith(_BLOCKS)]:
        name = blocks.removesuffix(_BLOCKS)
        info = info_of(tensors, blocks, name, (torch.uint8,))
        if len(info.shape) != 4 or info.shape[-1] != 16:
            raise BadCheckpointError(f"{blocks} has the shape {info.shape}, not (experts, rows, groups, 16)")
        experts, rows, groups, _ = info.shape
        info_of(tensors, name + _SCALES, name, (torch.uint8,), (experts, rows, groups))
        shape = (experts, groups * 32, rows)
        recipes[name] = Recipe(shape, (blocks, name + _SCALES), partial(_decode, name))
    return recipes


def _decode(name: str, read: Read, dtype: torch.dtype) -> Tensor:
    blocks, scales = read(name + _BLOCKS), finite(read, name + _SCALES)
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, groups * 32, rows, dtype=dtype)
    for expert in range(experts):  # never all of them in float32
        values = unpack_fp4(blocks[expert]) * scales[expert].unsqueeze(-1)  # [R, K / 32, 32]
        out[expert] = values.view(rows, groups * 32).T
    return out
