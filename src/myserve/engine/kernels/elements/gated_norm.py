"""RMSNorm of a row beside a gate, as recurrent layers end: each row from its own operands alone, in one pass.

    out = norm(x) * weight * act(gate),   or   norm(x * act(gate)) * weight

A row may be normed in groups. Every operation rounds as the model's own tensor operations do (`pointwise`).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from myserve.engine.kernels.elements.activations import sigmoid, silu
from myserve.engine.kernels.elements.pointwise import ROWS, element_kind, rounded, wide
from myserve.engine.kernels.lanes import FLOAT32, next_item, next_thread, size_of, sum_of_squares, view
from myserve.engine.kernels.launch import Kernel, fingerprint

__all__ = ["GATED_NORM", "gated_norm_kernel", "scratch_bytes"]

# Addresses; strides in bytes; counts. `width`: of a group.
GATED_NORM = (
    "x", "x_row", "gate", "gate_row", "weight", "out", "rows", "groups", "width", "gates_first", "rounds_first",
    "is_sigmoid", "scratch", "scratch_thread", "eps",
)  # fmt: skip

Kind = Any  # a value whose type is an element's: uint16 (bfloat16's bits) or float32
Record = Any  # GATED_NORM


def scratch_bytes(width: int) -> int:
    """Return what a thread keeps: a group's numbers and its gate's."""
    return 8 * width


@njit(error_model="numpy")
def _open(kind: Kind, gate: Any, width: int, is_sigmoid: bool, opened: Any) -> None:
    if is_sigmoid:
        for d in range(width):
            opened[d] = sigmoid(FLOAT32, wide(gate[d]))
    else:
        for d in range(width):
            opened[d] = silu(FLOAT32, wide(gate[d]))


@njit(error_model="numpy")
def _scale(kind: Kind, values: Any, weight: Any, scale: np.float32, width: int, rounds_first: bool) -> None:
    """values = values * scale * weight, as it is rounded before it meets a gate or is stored."""
    if rounds_first:
        for d in range(width):
            normed = wide(rounded(kind, values[d] * scale))
            values[d] = wide(rounded(kind, normed * wide(weight[d])))
    else:
        for d in range(width):
            values[d] = values[d] * scale * wide(weight[d])


@njit(error_model="numpy")
def _multiply(values: Any, opened: Any, width: int) -> None:
    for d in range(width):
        values[d] = values[d] * opened[d]


@njit(error_model="numpy")
def _norm_group(a: Record, kind: Kind, row: int, group: int, scratch: int) -> None:
    f32, width = np.float32(0), a.width
    begin = group * width * size_of(kind)
    x = carray(view(a.x + row * a.x_row + begin, kind), width)
    gate = carray(view(a.gate + row * a.gate_row + begin, kind), width)
    weight = carray(view(a.weight + begin, kind), width)
    out = carray(view(a.out + row * a.groups * width * size_of(kind) + begin, kind), width)
    values, opened = carray(view(scratch, f32), width), carray(view(scratch + 4 * width, f32), width)
    _open(kind, gate, width, a.is_sigmoid != 0, opened)
    for d in range(width):
        values[d] = wide(x[d])
    if a.gates_first != 0:
        _multiply(values, opened, width)
    mean = sum_of_squares(FLOAT32, scratch, width) / np.float32(width)
    _scale(kind, values, weight, np.float32(1.0) / np.sqrt(mean + a.eps), width, a.rounds_first != 0)
    if a.gates_first == 0:
        _multiply(values, opened, width)
    for d in range(width):
        out[d] = rounded(kind, values[d])


@njit(error_model="numpy")
def _gated_norm(a: Record, kind: Kind) -> None:
    scratch = a.scratch + next_thread(a) * a.scratch_thread
    item = next_item(a)
    while item * ROWS < a.rows:
        for row in range(item * ROWS, min(a.rows, item * ROWS + ROWS)):
            for group in range(a.groups):
                _norm_group(a, kind, row, group, scratch)
        item = next_item(a)


@functools.cache
def gated_norm_kernel(dtype: torch.dtype) -> Kernel:
    """Return the entry point for rows, gates and weights of one element type."""
    source, kind = fingerprint(), element_kind(dtype)

    def gated_norm(p: Any) -> None:
        if source >= 0:
            _gated_norm(carray(p, 1)[0], kind)

    return Kernel(GATED_NORM, gated_norm)
