"""Undoes what llama.cpp's converter does to a model's tensors: each function takes values as a file has them.

All of it is computed in float32. Where the converter rounded (it adds 1 to a norm's weights, and stores decays as
-exp(A_log)) the number nearest to what was there comes back: of a bfloat16 checkpoint the bits that it had, but for
weights of norms below 2^-15, whose last bits the file has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from myserve.errors import BadCheckpointError

__all__ = [
    "Undo",
    "by_head",
    "columns_by_key_head",
    "conv_weight",
    "decay_log",
    "flat",
    "halves_of_heads",
    "joined_by_key_head",
    "minus_one",
    "rows_by_key_head",
    "stacked",
    "values_by_key_head",
]

Undo = Callable[[Tensor, Any], Tensor]  # values in float32, the config of the text
_ROUNDING = 2.0**-23


def minus_one(values: Tensor, config: Any) -> Tensor:
    """Return a norm's weights without the 1 that was added to them."""
    return values - 1


def flat(values: Tensor, config: Any) -> Tensor:
    """Return a vector that was stored as a matrix: a column, or one row for each group of a norm."""
    return values.reshape(-1)


def conv_weight(values: Tensor, config: Any) -> Tensor:
    """Return the weights of a short convolution with the dimension that was dropped: [C, K] -> [C, 1, K]."""
    return values.unsqueeze(1) if values.dim() == 2 else values


def decay_log(values: Tensor, config: Any) -> Tensor:
    """Return A_log of A = -exp(A_log): a number of bfloat16 where one is as near as float32 can tell.

    Raises BadCheckpointError for a decay that is not negative, which no logarithm gives.

    >>> decay_log(-torch.tensor([0.5, 3.0]).exp(), None).tolist()
    [0.5, 3.0]
    """
    if not values.is_meta and not bool((values < 0).all()):
        raise BadCheckpointError("a decay of its recurrent layers is not below 0")
    exact = torch.log(-values.double())
    short = exact.bfloat16().double()
    is_near = (exact - short).abs() <= _ROUNDING * exact.abs().clamp(min=1)
    return torch.where(is_near, short, exact).float()


def by_head(undo: Undo) -> Undo:
    """Return `undo` for a decay of one number a head, which was stored as a column."""
    return lambda values, config: undo(values.reshape(-1), config)


def halves_of_heads(count: Callable[[Any], int]) -> Undo:
    """Return the undoing of interleaved halves of heads: rows [head, n, half] -> [head, half, n]."""

    def undo(values: Tensor, config: Any) -> Tensor:
        heads = count(config)
        if values.shape[0] % (2 * heads):
            raise BadCheckpointError(f"{values.shape[0]} rows of queries or keys are no {heads} heads")
        halves = values.reshape(heads, -1, 2, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)

    return undo


# --- the gated delta rule: value heads are stored [R, K], and transformers has those of a key head together, [K, R] ---


def rows_by_key_head(values: Tensor, config: Any) -> Tensor:
    """Return rows, one for each value head, in transformers' order."""
    return _by_key_head(values, config.linear_num_key_heads, 1)


def values_by_key_head(values: Tensor, config: Any) -> Tensor:
    """Return rows that are value heads in transformers' order, behind those of queries and keys if there are such."""
    width = config.linear_value_head_dim
    first = values.shape[0] - config.linear_num_value_heads * width
    if first not in (0, 2 * config.linear_num_key_heads * config.linear_key_head_dim):
        raise BadCheckpointError(
            f"{values.shape[0]} rows are no {config.linear_num_value_heads} heads of {width}"
        )
    return torch.cat([values[:first], _by_key_head(values[first:], config.linear_num_key_heads, width)])


def columns_by_key_head(values: Tensor, config: Any) -> Tensor:
    """Return columns, which are value heads, in transformers' order."""
    moved = _by_key_head(values.T, config.linear_num_key_heads, config.linear_value_head_dim)
    return moved.T.contiguous()


def _by_key_head(values: Tensor, key_heads: int, width: int) -> Tensor:
    tiled = values.reshape(-1, key_heads, width, *values.shape[1:])  # [R, K, width, ...]
    return tiled.transpose(0, 1).reshape(values.shape)


# --- several tensors of a file that are one of the model ---


def stacked(parts: Sequence[Tensor], config: Any) -> Tensor:
    """Return what follows one another in the rows of a matrix, or of every expert's: gate and up."""
    return torch.cat(list(parts), dim=-2)


def joined_by_key_head(parts: Sequence[Tensor], config: Any) -> Tensor:
    """Return queries, keys and values [Q + K + V, hidden] and gates [V, hidden] as one matrix, key head by key head."""
    rows, gates = parts
    heads, width = config.linear_num_key_heads, config.linear_num_key_heads * config.linear_key_head_dim
    pieces = [*torch.split(rows, [width, width, rows.shape[0] - 2 * width]), gates]
    by_heads = [piece.reshape(heads, -1, piece.shape[-1]) for piece in pieces]
    return torch.cat(by_heads, dim=1).reshape(-1, rows.shape[-1])
