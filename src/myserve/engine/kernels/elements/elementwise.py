"""Tensor operations element by element, as models write them between products: arithmetic, comparisons, copies.

One loop for all: a piece of a row is widened to float32, computed, and rounded where it is stored, which is how PyTorch
computes these few operations, so the bits are its own.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, njit

from myserve.engine.kernels.elements.pointwise import rounded, wide
from myserve.engine.kernels.lanes import next_item, next_thread, view
from myserve.engine.kernels.launch import Kernel, fingerprint

__all__ = [
    "BFLOAT16",
    "BOOL",
    "DIMENSIONS",
    "ELEMENTWISE",
    "FLOAT32",
    "NUMBER",
    "OPERATIONS",
    "PIECE",
    "elementwise_kernel",
]

DIMENSIONS = 4
PIECE = 256  # elements at once
OPERATIONS = ("copy", "neg", "add", "sub", "mul", "div", "gt", "ge", "lt", "le", "where")
COPY, NEG, ADD, SUB, MUL, DIV, GT, GE, LT, LE, WHERE = range(len(OPERATIONS))
# What an operand is; a NUMBER is the record's `offset`
BFLOAT16, FLOAT32, BOOL, NUMBER = range(4)

# Addresses, kinds and strides in bytes of what is written and read, by dimension; their sizes. A step at a time reads
# x, y and z: `x if z else y` in "where", x alone in "copy" and "neg".
_OPERANDS = ("out", "x", "y", "z")
ELEMENTWISE = (
    "operation",
    *(name for operand in _OPERANDS for name in (operand, f"{operand}_kind")),
    *(f"{operand}_stride{d}" for operand in _OPERANDS for d in range(DIMENSIONS)),
    *(f"size{d}" for d in range(DIMENSIONS)),
    "scratch", "scratch_thread", "offset",
)  # fmt: skip

SCRATCH_BYTES = 4 * 4 * PIECE  # of a thread: three operands and the result

Record = Any  # ELEMENTWISE


@njit(error_model="numpy")
def _load(kind: int, address: int, stride: int, number: np.float32, count: int, target: Any) -> None:
    half, f32, byte = np.uint16(0), np.float32(0), np.uint8(0)
    if kind == NUMBER:
        for d in range(count):
            target[d] = number
    elif kind == BFLOAT16 and stride == 2:
        halves = carray(view(address, half), count)
        for d in range(count):
            target[d] = wide(halves[d])
    elif kind == FLOAT32 and stride == 4:
        floats = carray(view(address, f32), count)
        for d in range(count):
            target[d] = floats[d]
    elif kind == BFLOAT16:
        for d in range(count):
            target[d] = wide(carray(view(address + d * stride, half), 1)[0])
    elif kind == FLOAT32:
        for d in range(count):
            target[d] = carray(view(address + d * stride, f32), 1)[0]
    else:
        for d in range(count):
            target[d] = np.float32(carray(view(address + d * stride, byte), 1)[0])


@njit(error_model="numpy")
def _store(kind: int, address: int, stride: int, count: int, source: Any) -> None:
    half, f32, byte = np.uint16(0), np.float32(0), np.uint8(0)
    if kind == BFLOAT16 and stride == 2:
        halves = carray(view(address, half), count)
        for d in range(count):
            halves[d] = rounded(half, source[d])
    elif kind == FLOAT32 and stride == 4:
        floats = carray(view(address, f32), count)
        for d in range(count):
            floats[d] = source[d]
    elif kind == BFLOAT16:
        for d in range(count):
            carray(view(address + d * stride, half), 1)[0] = rounded(half, source[d])
    elif kind == FLOAT32:
        for d in range(count):
            carray(view(address + d * stride, f32), 1)[0] = source[d]
    else:
        for d in range(count):
            carray(view(address + d * stride, byte), 1)[0] = np.uint8(source[d] != np.float32(0.0))


@njit(error_model="numpy")
def _compute(operation: int, x: Any, y: Any, z: Any, count: int, out: Any) -> None:
    one, zero = np.float32(1.0), np.float32(0.0)
    if operation == COPY:
        for d in range(count):
            out[d] = x[d]
    elif operation == NEG:
        for d in range(count):
            out[d] = -x[d]
    elif operation == ADD:
        for d in range(count):
            out[d] = x[d] + y[d]
    elif operation == SUB:
        for d in range(count):
            out[d] = x[d] - y[d]
    elif operation == MUL:
        for d in range(count):
            out[d] = x[d] * y[d]
    elif operation == DIV:
        for d in range(count):
            out[d] = x[d] / y[d]
    elif operation == GT:
        for d in range(count):
            out[d] = one if x[d] > y[d] else zero
    elif operation == GE:
        for d in range(count):
            out[d] = one if x[d] >= y[d] else zero
    elif operation == LT:
        for d in range(count):
            out[d] = one if x[d] < y[d] else zero
    elif operation == LE:
        for d in range(count):
            out[d] = one if x[d] <= y[d] else zero
    else:
        for d in range(count):
            out[d] = x[d] if z[d] != zero else y[d]


@njit(error_model="numpy")
def _piece(a: Record, row: int, first: int, count: int, scratch: int) -> None:
    """Elements first .. first + count of one row of the last dimension; `row` numbers the dimensions before it."""
    f32 = np.float32(0)
    x, y = carray(view(scratch, f32), PIECE), carray(view(scratch + 4 * PIECE, f32), PIECE)
    z, out = carray(view(scratch + 8 * PIECE, f32), PIECE), carray(view(scratch + 12 * PIECE, f32), PIECE)
    d2, rest = row % a.size2, row // a.size2
    d1, d0 = rest % a.size1, rest // a.size1
    at_x = a.x + d0 * a.x_stride0 + d1 * a.x_stride1 + d2 * a.x_stride2 + first * a.x_stride3
    _load(a.x_kind, at_x, a.x_stride3, a.offset, count, x)
    if a.operation != COPY and a.operation != NEG:
        at_y = a.y + d0 * a.y_stride0 + d1 * a.y_stride1 + d2 * a.y_stride2 + first * a.y_stride3
        _load(a.y_kind, at_y, a.y_stride3, a.offset, count, y)
    if a.operation == WHERE:
        at_z = a.z + d0 * a.z_stride0 + d1 * a.z_stride1 + d2 * a.z_stride2 + first * a.z_stride3
        _load(a.z_kind, at_z, a.z_stride3, a.offset, count, z)
    _compute(a.operation, x, y, z, count, out)
    at_out = a.out + d0 * a.out_stride0 + d1 * a.out_stride1 + d2 * a.out_stride2 + first * a.out_stride3
    _store(a.out_kind, at_out, a.out_stride3, count, out)


@njit(error_model="numpy")
def _elementwise(a: Record) -> None:
    scratch = a.scratch + next_thread(a) * a.scratch_thread
    pieces = (a.size3 + PIECE - 1) // PIECE
    items = a.size0 * a.size1 * a.size2 * pieces
    item = next_item(a)
    while item < items:
        first = item % pieces * PIECE
        _piece(a, item // pieces, first, min(PIECE, a.size3 - first), scratch)
        item = next_item(a)


@functools.cache
def elementwise_kernel() -> Kernel:
    """Return the entry point for all operations and element types."""
    source = fingerprint()

    def elementwise(p: Any) -> None:
        if source >= 0:
            _elementwise(carray(p, 1)[0])

    return Kernel(ELEMENTWISE, elementwise)
