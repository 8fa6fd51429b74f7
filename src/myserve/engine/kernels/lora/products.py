"""y += scale * B(A(x)) of each row's own adapter: the panels of `kernels.gemm` over the rows that share one.

Two launches: the first gathers the rows of an adapter and multiplies them by its A, the second multiplies the result
by its B, and adds it to the rows where they lie. Which rows have which adapter, and where an adapter's weights are, is
read from memory when a launch runs: a recorded step serves whatever adapters are loaded when it is replayed.

A product's sums are those of `PackedWeight`, in their order. Four roundings to the model's dtype: of A(x), of B(A(x)),
of its product with the scale, and of the sum with y.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any, cast

import numpy as np
import torch
from numba import carray, njit
from numba.extending import overload

from myserve.engine.kernels.dots import multiply_pairs
from myserve.engine.kernels.gemm import LINEAR, PANEL, ROWS, panel_by_lanes, panel_by_tiles
from myserve.engine.kernels.lanes import (
    BFLOAT16_BY_LANES,
    BFLOAT16_BY_PAIRS,
    BFLOAT16_BY_TILES,
    FLOAT32,
    LANES,
    add_and_round,
    add_scaled,
    by_pairs,
    by_tiles,
    is_half,
    next_item,
    next_thread,
    size_of,
    view,
)
from myserve.engine.kernels.launch import Kernel, fingerprint
from myserve.engine.kernels.tiles import Unit, get_tiles, has_wide_registers, product_unit, set_tiles

__all__ = ["ENTRY", "GROUP", "LORA", "lora_kernel", "lora_scratch_bytes", "padded_rank"]

Address = int
Kind = Any

# An adapter's entry in a layer's table, int64: the packed A and B, and the padded rank. A lies in groups of 16 columns,
# as many as its rank has: what is read behind them is another's memory, and is not used. 0: the adapter leaves the
# layer as it is.
ENTRY = ("down", "up", "rank")
# Of rows that share an adapter, int64: its place in the tables, the first in `order`, and the end. A place below 0 ends
# the groups.
GROUP = ("slot", "first", "end")
LORA = (
    "is_up", "x", "x_row", "inner", "out", "out_row", "columns", "order", "groups", "table", "scales", "zeros",
    "scratch", "scratch_bytes", "gathered", "tiles",
)  # fmt: skip
AHEAD = 1024  # bytes that are fetched ahead of a weight
PANELS_AT_ONCE = 4  # of B, that a thread takes for all adapters: some KiB of each lie side by side

# a type that Numba knows; the fields are not written out a second time
_Product: Any = cast("Any", namedtuple)("_Product", LINEAR)


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """Return a rank as the kernel has it: whole pairs or whole tiles in bfloat16, where these multiply."""
    step = 1 if dtype != torch.bfloat16 else 32 if product_unit() == "tiles" else 2
    return -(-rank // step) * step


def lora_scratch_bytes(inner: int, size: int) -> tuple[int, int]:
    """Return bytes of a thread's scratch, and where in it gathered rows begin: `inner` terms of `size` bytes.

    >>> whole, gathered = lora_scratch_bytes(64, 2)
    >>> whole % 64, gathered % 64, gathered < whole
    (0, 0, True)
    """
    sums = 64 * (3 + -(-4 * (ROWS * PANEL + 4 * inner) // 64))
    return sums + 64 * (4 + -(-max(ROWS * inner * size, ROWS * PANEL * size) // 64)), sums + 256


@njit(error_model="numpy")
def _product(
    a: Any, x: Address, x_row: int, rows: int, weight: Address, inner: int, columns: int, out: Address, out_row: int,
    scratch: Address,
) -> Any:  # fmt: skip
    """Return what a panel of `kernels.gemm` reads."""
    return _Product(
        x, x_row, weight, a.zeros, out, out_row, rows, inner, columns, scratch, a.gathered, a.tiles + 64 * 15,
        a.tiles + 64 * ((rows - 1) % 16),
    )  # fmt: skip


def _multiply(kind: Any, p: Any, panel: Any) -> Any:
    """Store x W^T of one panel of 64 columns, rounded."""
    raise NotImplementedError("compiled code alone")


@overload(_multiply, jit_options={"error_model": "numpy"})
def _overload_multiply(kind: Any, p: Any, panel: Any) -> Any:
    # Numba wants the names and annotations of the outer function
    def by_tiles_alone(kind: Any, p: Any, panel: Any) -> Any:
        panel_by_tiles(p, panel, 0, p.rows, p.scratch)

    def by_rows(kind: Any, p: Any, panel: Any) -> Any:
        _panel_of_few_rows(p, kind, panel)

    def by_lanes(kind: Any, p: Any, panel: Any) -> Any:
        panel_by_lanes(p, kind, panel, 0, p.rows, p.scratch)

    few = by_pairs(kind) or (is_half(kind) and has_wide_registers())
    return by_tiles_alone if by_tiles(kind) else by_rows if few else by_lanes


@njit(error_model="numpy")
def _panel_of_few_rows(p: Any, kind: Kind, panel: int) -> None:
    """`gemm`'s panel of a few rows, and of the groups of columns that there are: the same sums in less time."""
    group = p.inner * LANES * 2
    columns = min(PANEL, p.columns - PANEL * panel)
    w, out = p.weight + 4 * panel * group, p.out + 2 * PANEL * panel
    carray(view(p.scratch, np.float32(0)), p.rows * PANEL)[:] = np.float32(0.0)
    row = 0
    while row < p.rows:
        x, c, left = p.x + row * p.x_row, p.scratch + 4 * PANEL * row, p.rows - row
        if columns <= LANES:
            row += _one_group(kind, x, p.x_row, left, w, group, p.inner // 2, c)
        elif columns <= 2 * LANES:
            row += _two_groups(kind, x, p.x_row, left, w, group, p.inner // 2, c)
        else:
            row += _four_groups(kind, x, p.x_row, left, w, group, p.inner // 2, c)
    for r in range(p.rows):
        source, target = p.scratch + 4 * PANEL * r, out + r * p.out_row
        for n in range(0, columns // LANES * LANES, LANES):
            add_and_round(kind, 16, source + 4 * n, p.bias, target + 2 * n)
        for n in range(columns // LANES * LANES, columns):
            add_and_round(kind, 1, source + 4 * n, p.bias, target + 2 * n)


@njit(error_model="numpy")
def _one_group(
    kind: Kind, x: Address, x_row: int, left: int, w: Address, group: int, pairs: int, c: Address
) -> int:
    """Multiply up to 8 of the rows that are left; return how many."""
    if left >= 8:
        multiply_pairs(kind, 8, 1, x, x_row, w, group, pairs, c, AHEAD, 64)
        return 8
    if left >= 4:
        multiply_pairs(kind, 4, 1, x, x_row, w, group, pairs, c, AHEAD, 64)
        return 4
    if left >= 2:
        multiply_pairs(kind, 2, 1, x, x_row, w, group, pairs, c, AHEAD, 64)
        return 2
    multiply_pairs(kind, 1, 1, x, x_row, w, group, pairs, c, AHEAD, 64)
    return 1


@njit(error_model="numpy")
def _two_groups(
    kind: Kind, x: Address, x_row: int, left: int, w: Address, group: int, pairs: int, c: Address
) -> int:
    """Multiply up to 4 of the rows that are left; return how many."""
    if left >= 4:
        multiply_pairs(kind, 4, 2, x, x_row, w, group, pairs, c, AHEAD, 64)
        return 4
    if left >= 2:
        multiply_pairs(kind, 2, 2, x, x_row, w, group, pairs, c, AHEAD, 64)
        return 2
    multiply_pairs(kind, 1, 2, x, x_row, w, group, pairs, c, AHEAD, 64)
    return 1


@njit(error_model="numpy")
def _four_groups(
    kind: Kind, x: Address, x_row: int, left: int, w: Address, group: int, pairs: int, c: Address
) -> int:
    """Multiply up to 4 of the rows that are left; return how many."""
    if left >= 4:
        multiply_pairs(kind, 4, 4, x, x_row, w, group, pairs, c, AHEAD, 64)
        return 4
    if left >= 2:
        multiply_pairs(kind, 2, 4, x, x_row, w, group, pairs, c, AHEAD, 64)
        return 2
    multiply_pairs(kind, 1, 4, x, x_row, w, group, pairs, c, AHEAD, 64)
    return 1


@njit(error_model="numpy")
def _down(a: Any, kind: Kind, scratch: Address) -> None:
    """Take blocks of up to 32 rows of one group, in turns with the other threads."""
    order = carray(view(a.order, np.int64(0)), 1 << 40)
    table = carray(view(a.table, np.int64(0)), (1 << 30, 3))
    groups = carray(view(a.groups, np.int64(0)), (1 << 30, 3))
    item, passed, group = next_item(a), 0, 0
    while groups[group, 0] >= 0:
        entry, first, end = table[groups[group, 0]], groups[group, 1], groups[group, 2]
        blocks = (end - first + ROWS - 1) // ROWS if entry[0] != 0 else 0
        if item >= passed + blocks:
            passed += blocks
            group += 1
            continue
        begin = first + (item - passed) * ROWS
        rows = min(ROWS, end - begin)
        x = scratch + a.gathered
        width = a.inner * size_of(kind)
        for r in range(rows):
            source = carray(view(a.x + order[begin + r] * a.x_row, np.int32(0)), width // 4)
            carray(view(x + r * width, np.int32(0)), width // 4)[:] = source
        out = a.out + begin * a.out_row
        p = _product(a, x, width, rows, entry[0], a.inner, entry[2], out, a.out_row, scratch)
        for panel in range((entry[2] + PANEL - 1) // PANEL):
            _multiply(kind, p, panel)
        item = next_item(a)


@njit(error_model="numpy")
def _up(a: Any, kind: Kind, scratch: Address) -> None:
    """Take panels of 64 columns, of all rows, in turns with the other threads."""
    table = carray(view(a.table, np.int64(0)), (1 << 30, 3))
    groups = carray(view(a.groups, np.int64(0)), (1 << 30, 3))
    first = PANELS_AT_ONCE * next_item(a)
    made, size = scratch + a.gathered, size_of(kind)
    while PANEL * first < a.columns:
        last = min(first + PANELS_AT_ONCE, (a.columns + PANEL - 1) // PANEL)
        group = 0
        while groups[group, 0] >= 0:
            slot, end = groups[group, 0], groups[group, 2]
            entry = table[slot]
            for begin in range(groups[group, 1], end if entry[0] != 0 else 0, ROWS):
                rows, x = min(ROWS, end - begin), a.x + begin * a.x_row
                for panel in range(first, last):
                    out = made - size * PANEL * panel
                    p = _product(
                        a, x, a.x_row, rows, entry[1], entry[2], a.columns, out, size * PANEL, scratch
                    )
                    _multiply(kind, p, panel)
                    _add(a, kind, made, panel, begin, rows, slot)
            group += 1
        first = PANELS_AT_ONCE * next_item(a)


@njit(error_model="numpy")
def _add(a: Any, kind: Kind, made: Address, panel: int, begin: int, rows: int, slot: int) -> None:
    """Add scale * made [rows, 64] to the rows' panel of y."""
    order = carray(view(a.order, np.int64(0)), 1 << 40)
    columns, size, scale = min(PANEL, a.columns - PANEL * panel), size_of(kind), a.scales + 4 * slot
    for r in range(rows):
        source = made + size * PANEL * r
        target = a.out + order[begin + r] * a.out_row + size * PANEL * panel
        for n in range(0, columns // LANES * LANES, LANES):
            add_scaled(kind, 16, source + size * n, scale, target + size * n)
        for n in range(columns // LANES * LANES, columns):
            add_scaled(kind, 1, source + size * n, scale, target + size * n)


@njit(error_model="numpy")
def _work(a: Any, kind: Kind, scratch: Address) -> None:
    if a.is_up != 0:
        _up(a, kind, scratch)
    else:
        _down(a, kind, scratch)


@functools.cache
def lora_kernel(dtype: torch.dtype, unit: Unit | None = None) -> Kernel:
    """Return the kernel of both launches; bfloat16 on `unit`, or on the best of this machine."""
    source = fingerprint()

    def lora_float32(p: Any) -> None:
        a = carray(p, 1)[0]
        if source >= 0:
            _work(a, FLOAT32, a.scratch + a.scratch_bytes * next_thread(a))

    def lora_lanes(p: Any) -> None:
        a = carray(p, 1)[0]
        if source >= 0:
            _work(a, BFLOAT16_BY_LANES, a.scratch + a.scratch_bytes * next_thread(a))

    def lora_pairs(p: Any) -> None:
        a = carray(p, 1)[0]
        if source >= 0:
            _work(a, BFLOAT16_BY_PAIRS, a.scratch + a.scratch_bytes * next_thread(a))

    def lora_tiles(p: Any) -> None:
        a = carray(p, 1)[0]
        scratch = a.scratch + a.scratch_bytes * next_thread(a)
        # the configuration that the thread had: behind the sums, in front of the gathered rows
        get_tiles(scratch + a.gathered - 64)
        if source >= 0:
            _work(a, BFLOAT16_BY_TILES, scratch)
        set_tiles(scratch + a.gathered - 64)

    if dtype == torch.float32:
        return Kernel(LORA, lora_float32)
    chosen = {"tiles": lora_tiles, "pairs": lora_pairs, "lanes": lora_lanes}
    return Kernel(LORA, chosen[unit or product_unit()])
