"""FP8 checkpoints: each weight is 8-bit floats times a scale, of the whole tensor, of each row, or of each block.

The layouts are those of DeepSeek-V3 and of transformers' `fp8` (`X.weight_scale_inv`, blocks of 128 x 128; in spite of
its name it is what values are multiplied with), of vLLM's per-tensor scales (`X.weight_scale`) and of `fbgemm_fp8`
(a scale a row). Scales of activations are passed over: activations stay as they are, which is more exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from myserve.engine.weights.formats.recipe import Read, Recipe, Recipes, finite, part_of
from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadCheckpointError

__all__ = ["FLOAT8", "Grid", "float8_recipes", "grid_of", "scaled"]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
_SUFFIXES = ("_scale_inv", "_scale")
Grid = tuple[int, int]  # rows and columns of the weight that share a scale


def float8_recipes(described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> Recipes:
    """Return the recipe of every weight in FP8. Raises BadCheckpointError for scales that are missing or do not fit."""
    block = described.get("weight_block_size")
    recipes: Recipes = {}
    for name, info in tensors.items():
        if info.dtype not in FLOAT8 or name.endswith(_SUFFIXES):
            continue
        found = [name + suffix for suffix in _SUFFIXES if name + suffix in tensors]
        if len(found) != 1:
            raise BadCheckpointError(
                f"{name} is in FP8 and has {'no' if not found else 'two sorts of'} scales"
            )
        grid = grid_of(name, info, found[0], part_of(tensors, found[0], name), block)
        recipes[name] = Recipe(info.shape, (name, found[0]), partial(_decode, name, found[0], grid))
    return recipes


def grid_of(name: str, info: TensorInfo, scale_name: str, scale: TensorInfo, block: Any) -> Grid:
    """Return which values of a weight [..., N, K] share a scale, by the shapes of both."""
    if scale.dtype not in _SCALES:
        raise BadCheckpointError(f"{scale_name} is {scale.dtype}, which no scales of FP8 are")
    if len(info.shape) < 2 or 0 in info.shape:
        raise BadCheckpointError(f"{name} is in FP8, and no matrix")
    *lead, rows, columns = info.shape
    # Where a config names blocks, one scale, or one a row, means that those of the blocks were lost, or that it is of
    # another checkpoint. The layers of vLLM and of transformers take no other shape, either.
    grids = [(rows, columns), (1, columns)] if block is None else [_named(block)]
    for grid in grids:
        whole = (*lead, -(-rows // grid[0]), -(-columns // grid[1]))
        # a scale of a whole tensor, or of a row, is written with and without the dimensions that are 1
        short = (
            {tuple(lead), (*lead, 1)} if whole[-2:] == (1, 1) else {whole[:-1]} if whole[-1] == 1 else set()
        )
        if scale.shape in {whole, *short}:
            return grid
    what = f"{scale_name} has the shape {scale.shape}, which is no scale of {name} {info.shape}"
    if block is None:
        raise BadCheckpointError(f"{what} as a whole, or by rows; config.json names no weight_block_size")
    raise BadCheckpointError(
        f"{what} by blocks of {grids[0]}, which config.json names, {whole}: take a checkpoint that is whole, or leave "
        "the blocks out of config.json if it has one scale a tensor or a row"
    )


def _named(block: Any) -> Grid:
    """Return the two sizes of a block as a config names them. Raises BadCheckpointError for what is no block."""
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or any(not isinstance(b, int) or b < 1 for b in block)
    ):
        raise BadCheckpointError(f"weight_block_size is {block!r}, not two sizes")
    return int(block[0]), int(block[1])


def _decode(name: str, scale_name: str, grid: Grid, read: Read, dtype: torch.dtype) -> Tensor:
    return scaled(read(name), finite(read, scale_name), grid, dtype)


def scaled(values: Tensor, scales: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return values [..., N, K] times the scales of their blocks, multiplied in float32 and rounded once.

    >>> scaled(torch.ones(2, 3), torch.tensor([[1.0, 2.0]]), (2, 2), torch.float32).tolist()
    [[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]]
    """
    *lead, rows, columns = values.shape
    height, width = grid
    scales = scales.reshape(*lead, -(-rows // height), -(-columns // width))
    by_column = scales.repeat_interleave(width, -1)[..., :columns]  # [..., row blocks, K]
    if height == 1:
        return (values.float() * by_column).to(dtype)
    out = torch.empty(values.shape, dtype=dtype)
    for i in range(scales.shape[-2]):  # never the whole weight in float32
        block = (..., slice(i * height, (i + 1) * height), slice(None))
        out[block] = values[block].float() * by_column[..., i : i + 1, :]
    return out
