"""y = (xq Wq^T) * scales + b over int8: the loops of `kernels.gemm` with sums that are exact integers.

A thread takes a panel of 64 columns and multiplies a sweep of rows by it. Sums of integers have no order, so a row's
bits depend on its own bytes and scale alone, by construction, on every unit alike.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from myserve.engine.kernels.gemm import MOST_PAIR_ROWS, PANEL, ROWS, _items, _share
from myserve.engine.kernels.int8.dots import (
    BY_DOTS,
    BY_LANES,
    Int8Unit,
    int8_unit,
    multiply_bytes,
    scale_and_round,
)
from myserve.engine.kernels.int8.rounding import LARGEST
from myserve.engine.kernels.lanes import (
    BFLOAT16_BY_LANES,
    FLOAT32,
    LANES,
    next_item,
    next_thread,
    size_of,
    view,
)
from myserve.engine.kernels.launch import Kernel, fingerprint
from myserve.engine.kernels.tiles import get_tiles, multiply_byte_tiles, set_tiles

__all__ = ["INNER_STEP", "LINEAR_INT8", "MOST_INNER", "linear_int8_kernel"]

FOURS_AT_ONCE = 128  # of terms: with 64 columns, 32 KiB of weights
INNER_STEP = 64  # terms of a row of a tile; K is padded to it
MOST_INNER = ((1 << 31) - 1) // (
    LARGEST * 128
)  # terms whose sum fits 32 bits (others' checkpoints may hold a -128)

Address = int
Kind = Any

# The weight lies in groups of 16 columns, int8 [N / 16, K / 4, 16, 4], N a multiple of the panel and K of INNER_STEP,
# with zeros behind. x is uint8, 128 above its int8: `starts` [N] (int32) is -128 times the sum of a column.
LINEAR_INT8 = (
    "x", "x_row", "x_scales", "weight", "starts", "scales", "bias", "out", "out_row", "rows", "inner", "columns",
    "scratch", "scratch_bytes", "full_tiles", "last_tiles",
)  # fmt: skip


@njit(error_model="numpy")
def _finish(a: Any, kind: Kind, sums: Address, row: int, count: int, column: int) -> None:
    """out[row : row + count, column : column + 64] = sums [count, 64], scaled, with the bias, rounded."""
    end = min(PANEL, a.columns - column)
    whole = end // LANES * LANES
    x_scales = carray(view(a.x_scales, np.float32(0)), a.rows)
    for r in range(count):
        x_scale = x_scales[row + r]
        source, first = sums + 256 * r, 4 * column
        target = a.out + (row + r) * a.out_row + size_of(kind) * column
        for n in range(0, whole, LANES):
            at = first + 4 * n
            scale_and_round(kind, 16, source + 4 * n, a.starts + at, x_scale, a.scales + at, a.bias + at,
                            target + size_of(kind) * n)  # fmt: skip
        for n in range(whole, end):
            at = first + 4 * n
            scale_and_round(kind, 1, source + 4 * n, a.starts + at, x_scale, a.scales + at, a.bias + at,
                            target + size_of(kind) * n)  # fmt: skip


@njit(error_model="numpy")
def _panel(
    a: Any, kind: Kind, unit: Any, panel: int, following: int, first: int, last: int, scratch: Address
) -> None:
    """A chunk of the weights at a time goes by all rows while the next is fetched, as in `gemm.panel_by_pairs`."""
    group = a.inner * LANES
    weight = a.weight + 4 * panel * group
    to_following = 4 * group * (following - panel)
    for block in range(first, last, ROWS):
        rows = min(ROWS, last - block)
        carray(view(scratch, np.int32(0)), rows * PANEL)[:] = np.int32(0)
        parts = (rows + MOST_PAIR_ROWS - 1) // MOST_PAIR_ROWS
        for k in range(0, a.inner // 4, FOURS_AT_ONCE):
            fours = min(FOURS_AT_ONCE, a.inner // 4 - k)
            ahead = 64 * fours if k + fours < a.inner // 4 else to_following - 64 * k
            for part in range(parts):  # of nearly one size: a row that is left alone costs half of six
                row, end = rows * part // parts, rows * (part + 1) // parts
                _multiply(
                    unit, end - row, a.x + (block + row) * a.x_row + 4 * k, a.x_row, weight + 64 * k, group, fours,
                    scratch + 4 * PANEL * row, ahead + 64 * fours * part // parts, (64 + parts - 1) // parts,
                )  # fmt: skip
        _finish(a, kind, scratch, block, rows, PANEL * panel)


@njit(error_model="numpy")
def _multiply(
    unit: Any,
    rows: int,
    x: Address,
    x_row: int,
    w: Address,
    w_group: int,
    fours: int,
    c: Address,
    ahead: int,
    stride: int,
) -> None:
    """`multiply_bytes` for any number of rows that fits the registers."""
    if rows == 6:
        multiply_bytes(unit, 6, x, x_row, w, w_group, fours, c, ahead, stride)
    elif rows == 5:
        multiply_bytes(unit, 5, x, x_row, w, w_group, fours, c, ahead, stride)
    elif rows == 4:
        multiply_bytes(unit, 4, x, x_row, w, w_group, fours, c, ahead, stride)
    elif rows == 3:
        multiply_bytes(unit, 3, x, x_row, w, w_group, fours, c, ahead, stride)
    elif rows == 2:
        multiply_bytes(unit, 2, x, x_row, w, w_group, fours, c, ahead, stride)
    else:
        multiply_bytes(unit, 1, x, x_row, w, w_group, fours, c, ahead, stride)


@njit(error_model="numpy")
def _panel_by_tiles(a: Any, kind: Kind, panel: int, first: int, last: int, scratch: Address) -> None:
    """`gemm.panel_by_tiles` with bytes: a step has 64 terms where bfloat16 has 32, in the same 64 bytes."""
    group = a.inner * LANES
    weight = a.weight + 4 * panel * group
    whole = first + (last - first) // 16 * 16
    steps = a.inner // INNER_STEP
    if whole > first:
        set_tiles(a.full_tiles)
    for row in range(first, whole, ROWS):
        x = a.x + row * a.x_row
        for half in range(2):
            w, c = weight + 2 * half * group, scratch + 128 * half
            if whole - row > 16:
                multiply_byte_tiles(2, x, a.x_row, w, w + group, 64, 1024, steps, c, 4 * PANEL, 1024, 1)
            else:
                multiply_byte_tiles(1, x, a.x_row, w, w + group, 64, 1024, steps, c, 4 * PANEL, 1024, 1)
        _finish(a, kind, scratch, row, min(ROWS, whole - row), PANEL * panel)
    if whole < last:
        set_tiles(a.last_tiles)
        x = a.x + whole * a.x_row
        for half in range(2):
            w, c = weight + 2 * half * group, scratch + 128 * half
            multiply_byte_tiles(1, x, a.x_row, w, w + group, 64, 1024, steps, c, 4 * PANEL, 1024, 1)
        _finish(a, kind, scratch, whole, last - whole, PANEL * panel)


@functools.cache
def linear_int8_kernel(dtype: torch.dtype, unit: Int8Unit | None = None) -> Kernel:
    """Return the entry point that gives one element type, bfloat16 or float32, on `unit` or the best of this CPU."""
    source = fingerprint()
    kind = BFLOAT16_BY_LANES if dtype == torch.bfloat16 else FLOAT32
    by = BY_LANES if (unit or int8_unit()) == "lanes" else BY_DOTS

    def linear_int8(p: Any) -> None:
        a = carray(p, 1)[0]
        scratch = a.scratch + a.scratch_bytes * next_thread(a)
        item = next_item(a)
        while item < _items(a) and source >= 0:
            panel, first, last = _share(a, item)
            item = next_item(a)
            following = _share(a, item)[0] if item < _items(a) else panel
            _panel(a, kind, by, panel, following, first, last, scratch)

    def linear_int8_tiles(p: Any) -> None:
        a = carray(p, 1)[0]
        scratch = a.scratch + a.scratch_bytes * next_thread(a)
        get_tiles(scratch + 4 * ROWS * PANEL)
        item = next_item(a)
        while item < _items(a) and source >= 0:
            panel, first, last = _share(a, item)
            _panel_by_tiles(a, kind, panel, first, last, scratch)
            item = next_item(a)
        set_tiles(scratch + 4 * ROWS * PANEL)

    chosen = linear_int8_tiles if (unit or int8_unit()) == "tiles" else linear_int8
    return Kernel(LINEAR_INT8, chosen)
