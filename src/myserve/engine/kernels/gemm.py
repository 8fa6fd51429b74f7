"""y = x W^T + b, each row in one fixed order over k: the loops around `lanes` and `tiles`.

A thread takes a panel of 64 columns and multiplies a sweep of rows by it. How many rows there are only decides how they
are grouped over one load of the weights.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from myserve.engine.kernels.dots import multiply, multiply_pairs, multiply_wide, multiply_widening
from myserve.engine.kernels.lanes import (
    BFLOAT16_BY_LANES,
    BFLOAT16_BY_PAIRS,
    FLOAT32,
    LANES,
    add_and_round,
    next_item,
    next_thread,
    size_of,
    view,
    widen,
)
from myserve.engine.kernels.launch import Kernel, fingerprint
from myserve.engine.kernels.tiles import (
    Unit,
    get_tiles,
    has_wide_registers,
    multiply_tiles,
    product_unit,
    set_tiles,
)

__all__ = [
    "LINEAR", "MOST_PAIR_ROWS", "PAIRS_AT_ONCE", "PANEL", "ROWS", "SWEEP_BYTES", "linear_kernel", "panel_by_lanes",
    "panel_by_pairs", "panel_by_tiles", "panel_by_widening", "scratch_bytes",
]  # fmt: skip

PANEL = 64  # columns: four vectors, two pairs of tiles
ROWS = 32  # of a thread's scratch [ROWS, PANEL]
SWEEP_BYTES = 1 << 20  # of x
MOST_PAIR_ROWS = 6  # times four vectors of sums, beside four of weights: what 32 registers hold
PAIRS_AT_ONCE = 128  # of terms: with 64 columns, 32 KiB of weights
PAIRS_WIDENED = 64  # where they become float32, as many KiB

Address = int
Kind = Any

# The weight lies in groups of 16 columns: float32 [N / 16, K, 16]; bfloat16 [N / 16, K / 2, 16, 2]. N is a multiple of
# the panel and, in bfloat16, K of 32, with zeros behind; x has all K.
LINEAR = (
    "x", "x_row", "weight", "bias", "out", "out_row", "rows", "inner", "columns", "scratch", "scratch_bytes",
    "full_tiles", "last_tiles",
)  # fmt: skip


@njit(error_model="numpy")
def _finish(a: Any, kind: Kind, sums: Address, row: int, count: int, column: int) -> None:
    """Store out[row : row + count, column : column + 64] = sums [count, 64] + bias, rounded."""
    end = min(PANEL, a.columns - column)
    whole = end // LANES * LANES
    for r in range(count):
        source, bias = sums + 256 * r, a.bias + 4 * column
        target = a.out + (row + r) * a.out_row + size_of(kind) * column
        for n in range(0, whole, LANES):
            add_and_round(kind, 16, source + 4 * n, bias + 4 * n, target + size_of(kind) * n)
        for n in range(whole, end):
            add_and_round(kind, 1, source + 4 * n, bias + 4 * n, target + size_of(kind) * n)


@njit(error_model="numpy")
def panel_by_lanes(a: Any, kind: Kind, panel: int, first: int, last: int, scratch: Address) -> None:
    """Multiply one panel by float32 lanes: four rows at a time, widened to float32."""
    group = a.inner * LANES * size_of(kind)
    groups = carray(view(scratch, np.int64(0)), 4)
    for g in range(4):
        groups[g] = a.weight + (4 * panel + g) * group
    sums, wide, step = scratch + 64, scratch + 64 + 4 * ROWS * PANEL, LANES * 4
    for row in range(first, last, 4):
        count = min(4, last - row)
        for r in range(count):
            for k in range(0, a.inner // LANES * LANES, LANES):
                widen(kind, 16, a.x + (row + r) * a.x_row + size_of(kind) * k, wide + 4 * (r * a.inner + k))
            for k in range(a.inner // LANES * LANES, a.inner):
                widen(kind, 1, a.x + (row + r) * a.x_row + size_of(kind) * k, wide + 4 * (r * a.inner + k))
        if count > 2:
            multiply(kind, 4, 4, wide, 4 * a.inner, scratch, step, a.inner, 1024, sums, 4 * PANEL)
        else:
            multiply(kind, 2, 4, wide, 4 * a.inner, scratch, step, a.inner, 1024, sums, 4 * PANEL)
        _finish(a, kind, sums, row, count, PANEL * panel)


@njit(error_model="numpy")
def panel_by_pairs(a: Any, panel: int, following: int, first: int, last: int, scratch: Address) -> None:
    """Multiply one panel by dot products of pairs: a chunk of weights goes by all rows while the next is fetched.

    The last chunk fetches panel `following`. So memory is busy while rows are multiplied, however many there are.
    """
    kind = BFLOAT16_BY_LANES
    group = a.inner * LANES * 2
    weight = a.weight + 4 * panel * group
    to_following = 4 * group * (following - panel)
    for block in range(first, last, ROWS):
        rows = min(ROWS, last - block)
        carray(view(scratch, np.float32(0)), rows * PANEL)[:] = np.float32(0.0)
        parts = (rows + MOST_PAIR_ROWS - 1) // MOST_PAIR_ROWS
        for k in range(0, a.inner // 2, PAIRS_AT_ONCE):
            pairs = min(PAIRS_AT_ONCE, a.inner // 2 - k)
            ahead = 64 * pairs if k + pairs < a.inner // 2 else to_following - 64 * k
            for part in range(parts):  # of nearly one size: a row that is left alone costs half of six
                row, end = rows * part // parts, rows * (part + 1) // parts
                _multiply_pairs(
                    end - row, a.x + (block + row) * a.x_row + 4 * k, a.x_row, weight + 64 * k, group, pairs,
                    scratch + 4 * PANEL * row, ahead + 64 * pairs * part // parts, (64 + parts - 1) // parts,
                )  # fmt: skip
        _finish(a, kind, scratch, block, rows, PANEL * panel)


@njit(error_model="numpy")
def panel_by_widening(a: Any, panel: int, following: int, first: int, last: int, scratch: Address) -> None:
    """Do as `panel_by_lanes`, bit for bit, on AVX-512's registers: a chunk of weights goes by all rows, as by pairs.

    Where many rows meet it, it is widened for the first of them and stays widened for the others.
    """
    kind = BFLOAT16_BY_LANES
    group = a.inner * LANES * 2
    weight = a.weight + 4 * panel * group
    to_following = 4 * group * (following - panel)
    wide = scratch + 4 * ROWS * PANEL
    wide_x = wide + 8 * PAIRS_WIDENED * PANEL
    for block in range(first, last, ROWS):
        rows = min(ROWS, last - block)
        carray(view(scratch, np.float32(0)), rows * PANEL)[:] = np.float32(0.0)
        parts = (rows + MOST_PAIR_ROWS - 1) // MOST_PAIR_ROWS
        # few rows wait for memory, and fetch the next chunk the earlier the larger it is
        at_once = PAIRS_AT_ONCE if parts <= 2 else PAIRS_WIDENED
        for k in range(0, a.inner // 2, at_once):
            pairs = min(at_once, a.inner // 2 - k)
            _widen_rows(kind, a.x + block * a.x_row + 4 * k, a.x_row, rows, 2 * pairs, wide_x)
            ahead = 64 * pairs if k + pairs < a.inner // 2 else to_following - 64 * k
            for part in range(parts):
                row, end = rows * part // parts, rows * (part + 1) // parts
                x, c = wide_x + 8 * PAIRS_AT_ONCE * row, scratch + 4 * PANEL * row
                if parts <= 2:
                    fetched, stride = ahead + 64 * pairs * part // parts, (64 + parts - 1) // parts
                    _multiply_widening(end - row, x, weight + 64 * k, group, pairs, c, fetched, stride)
                elif part == 0:
                    _multiply_keeping(end - row, x, weight + 64 * k, group, pairs, c, ahead, wide)
                else:
                    _multiply_wide(end - row, x, wide, pairs, c)
        _finish(a, kind, scratch, block, rows, PANEL * panel)


@njit(error_model="numpy")
def _widen_rows(kind: Kind, x: Address, x_row: int, rows: int, terms: int, target: Address) -> None:
    for r in range(rows):
        for k in range(0, terms, LANES):
            widen(kind, 16, x + r * x_row + 2 * k, target + 8 * PAIRS_AT_ONCE * r + 4 * k)


@njit(error_model="numpy")
def _multiply_widening(
    rows: int, x: Address, w: Address, group: int, pairs: int, c: Address, ahead: int, stride: int
) -> None:
    """Call `multiply_widening` for any number of rows that fits the registers, as `_multiply_pairs` does."""
    x_row = 8 * PAIRS_AT_ONCE
    if rows == 6:
        multiply_widening(6, 0, x, x_row, w, group, pairs, c, ahead, stride, 0)
    elif rows == 5:
        multiply_widening(5, 0, x, x_row, w, group, pairs, c, ahead, stride, 0)
    elif rows == 4:
        multiply_widening(4, 0, x, x_row, w, group, pairs, c, ahead, stride, 0)
    elif rows == 3:
        multiply_widening(3, 0, x, x_row, w, group, pairs, c, ahead, stride, 0)
    elif rows == 2:
        multiply_widening(2, 0, x, x_row, w, group, pairs, c, ahead, stride, 0)
    else:
        multiply_widening(1, 0, x, x_row, w, group, pairs, c, ahead, stride, 0)


@njit(error_model="numpy")
def _multiply_keeping(
    rows: int, x: Address, w: Address, group: int, pairs: int, c: Address, ahead: int, wide: Address
) -> None:
    """The first of three parts or more has four rows at least."""
    x_row = 8 * PAIRS_AT_ONCE
    if rows == 6:
        multiply_widening(6, 1, x, x_row, w, group, pairs, c, ahead, 64, wide)
    elif rows == 5:
        multiply_widening(5, 1, x, x_row, w, group, pairs, c, ahead, 64, wide)
    else:
        multiply_widening(4, 1, x, x_row, w, group, pairs, c, ahead, 64, wide)


@njit(error_model="numpy")
def _multiply_wide(rows: int, x: Address, wide: Address, pairs: int, c: Address) -> None:
    x_row = 8 * PAIRS_AT_ONCE
    if rows == 6:
        multiply_wide(6, x, x_row, wide, pairs, c)
    elif rows == 5:
        multiply_wide(5, x, x_row, wide, pairs, c)
    else:
        multiply_wide(4, x, x_row, wide, pairs, c)


@njit(error_model="numpy")
def _multiply_pairs(
    rows: int,
    x: Address,
    x_row: int,
    w: Address,
    w_group: int,
    pairs: int,
    c: Address,
    ahead: int,
    stride: int,
) -> None:
    """Call `multiply_pairs` for any number of rows that fits the registers: a literal, so one call each."""
    if rows == 6:
        multiply_pairs(BFLOAT16_BY_PAIRS, 6, 4, x, x_row, w, w_group, pairs, c, ahead, stride)
    elif rows == 5:
        multiply_pairs(BFLOAT16_BY_PAIRS, 5, 4, x, x_row, w, w_group, pairs, c, ahead, stride)
    elif rows == 4:
        multiply_pairs(BFLOAT16_BY_PAIRS, 4, 4, x, x_row, w, w_group, pairs, c, ahead, stride)
    elif rows == 3:
        multiply_pairs(BFLOAT16_BY_PAIRS, 3, 4, x, x_row, w, w_group, pairs, c, ahead, stride)
    elif rows == 2:
        multiply_pairs(BFLOAT16_BY_PAIRS, 2, 4, x, x_row, w, w_group, pairs, c, ahead, stride)
    else:
        multiply_pairs(BFLOAT16_BY_PAIRS, 1, 4, x, x_row, w, w_group, pairs, c, ahead, stride)


@njit(error_model="numpy")
def panel_by_tiles(a: Any, panel: int, first: int, last: int, scratch: Address) -> None:
    kind = BFLOAT16_BY_LANES
    group = a.inner * LANES * 2
    weight = a.weight + 4 * panel * group
    whole = first + (last - first) // 16 * 16
    if whole > first:
        set_tiles(a.full_tiles)
    for row in range(first, whole, ROWS):
        x = a.x + row * a.x_row
        for half in range(2):
            w, c = weight + 2 * half * group, scratch + 128 * half
            if whole - row > 16:
                multiply_tiles(2, x, a.x_row, w, w + group, 64, 1024, a.inner // 32, c, 4 * PANEL, 1024, 1)
            else:
                multiply_tiles(1, x, a.x_row, w, w + group, 64, 1024, a.inner // 32, c, 4 * PANEL, 1024, 1)
        _finish(a, kind, scratch, row, min(ROWS, whole - row), PANEL * panel)
    if whole < last:
        set_tiles(a.last_tiles)
        for half in range(2):
            w, c = weight + 2 * half * group, scratch + 128 * half
            multiply_tiles(
                1,
                a.x + whole * a.x_row,
                a.x_row,
                w,
                w + group,
                64,
                1024,
                a.inner // 32,
                c,
                4 * PANEL,
                1024,
                1,
            )
        _finish(a, kind, scratch, whole, last - whole, PANEL * panel)


@njit(error_model="numpy")
def _rows_at_once(a: Any) -> Any:
    """Return how many rows fit a core's second-level cache while the panels pass by, in whole tiles."""
    return max(1, SWEEP_BYTES // a.x_row // ROWS) * ROWS


@njit(error_model="numpy")
def _items(a: Any) -> Any:
    """Return the number of work items: panels times sweeps of rows."""
    rows = _rows_at_once(a)
    return (a.columns + PANEL - 1) // PANEL * ((a.rows + rows - 1) // rows)


@njit(error_model="numpy")
def _share(a: Any, item: int) -> Any:
    """Return a work item's panel, and the rows of its sweep."""
    panels, rows = (a.columns + PANEL - 1) // PANEL, _rows_at_once(a)
    first = item // panels * rows
    return item % panels, first, min(a.rows, first + rows)


def scratch_bytes(inner: int) -> int:
    """Return what a thread keeps: addresses, sums, and four rows of x or a chunk of rows and weights, as float32."""
    rows, chunk = 4 * inner, 2 * (PAIRS_WIDENED * PANEL + PAIRS_AT_ONCE * ROWS)
    return 64 * (3 + -(-4 * (ROWS * PANEL + max(rows, chunk)) // 64))


@functools.cache
def linear_kernel(dtype: torch.dtype, unit: Unit | None = None) -> Kernel:
    """Return the entry point for one element type; bfloat16 on `unit`, or on the best of this machine."""
    source = fingerprint()

    def linear_float32(p: Any) -> None:
        a = carray(p, 1)[0]
        scratch = a.scratch + a.scratch_bytes * next_thread(a)
        item = next_item(a)
        while item < _items(a) and source >= 0:
            panel, first, last = _share(a, item)
            panel_by_lanes(a, FLOAT32, panel, first, last, scratch)
            item = next_item(a)

    def linear_lanes(p: Any) -> None:
        a = carray(p, 1)[0]
        scratch = a.scratch + a.scratch_bytes * next_thread(a)
        item = next_item(a)
        while item < _items(a) and source >= 0:
            panel, first, last = _share(a, item)
            panel_by_lanes(a, BFLOAT16_BY_LANES, panel, first, last, scratch)
            item = next_item(a)

    def linear_widening(p: Any) -> None:
        a = carray(p, 1)[0]
        scratch = a.scratch + a.scratch_bytes * next_thread(a)
        item = next_item(a)
        while item < _items(a) and source >= 0:
            panel, first, last = _share(a, item)
            item = next_item(a)
            following = _share(a, item)[0] if item < _items(a) else panel
            panel_by_widening(a, panel, following, first, last, scratch)

    def linear_pairs(p: Any) -> None:
        a = carray(p, 1)[0]
        scratch = a.scratch + a.scratch_bytes * next_thread(a)
        item = next_item(a)
        while item < _items(a) and source >= 0:
            panel, first, last = _share(a, item)
            item = next_item(a)
            following = _share(a, item)[0] if item < _items(a) else panel
            panel_by_pairs(a, panel, following, first, last, scratch)

    def linear_tiles(p: Any) -> None:
        a = carray(p, 1)[0]
        scratch = a.scratch + a.scratch_bytes * next_thread(a)
        get_tiles(scratch + 4 * ROWS * PANEL)
        item = next_item(a)
        while item < _items(a) and source >= 0:
            panel, first, last = _share(a, item)
            panel_by_tiles(a, panel, first, last, scratch)
            item = next_item(a)
        set_tiles(scratch + 4 * ROWS * PANEL)

    if dtype == torch.float32:
        return Kernel(LINEAR, linear_float32)
    lanes = linear_widening if has_wide_registers() else linear_lanes
    chosen = {"tiles": linear_tiles, "pairs": linear_pairs, "lanes": lanes}
    return Kernel(LINEAR, chosen[unit or product_unit()])
