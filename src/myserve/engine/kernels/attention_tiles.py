"""The pieces of attention where AMX tiles multiply: queries and weights stay bfloat16, sums lie in memory between."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from myserve.engine.kernels.lanes import BLOCK_SIZE, LANES, PARTITION, scale_lanes, view
from myserve.engine.kernels.tiles import multiply_tiles

__all__ = ["copy_keys", "mix_by_tiles", "scale_rows", "scores_by_tiles"]

Address = int  # of a byte


@njit(error_model="numpy")
def scores_by_tiles(rows: int, query: Address, dim: int, keys: Address, scores: Address, ahead: int) -> None:
    """`kernels._scores` for bfloat16 queries."""
    groups = carray(view(keys, np.int64(0)), PARTITION // LANES)
    row, s_row, k_row = 2 * dim, 4 * PARTITION, 4 * BLOCK_SIZE
    for done in range(0, rows, 32):
        q, s = query + done * row, scores + done * s_row
        for g in range(0, PARTITION // LANES, 2):
            c = s + 64 * g
            if rows - done > 16:
                multiply_tiles(
                    2, q, row, groups[g], groups[g + 1], k_row, 16 * k_row, dim // 32, c, s_row, ahead, 1
                )
            else:
                multiply_tiles(
                    1, q, row, groups[g], groups[g + 1], k_row, 16 * k_row, dim // 32, c, s_row, ahead, 1
                )


@njit(error_model="numpy")
def mix_by_tiles(
    rows: int,
    weights: Address,
    values: Address,
    blocks: int,
    distance: int,
    dim: int,
    out: Address,
    ahead: int,
) -> None:
    """`kernels._mix` for bfloat16 weights, over one or two whole blocks `distance` bytes apart; `out` has been scaled.

    Two at once read and write `out` once, with the same bits.
    """
    w_row, row = 2 * PARTITION, 4 * dim
    for done in range(0, rows, 32):
        w, o = weights + done * w_row, out + done * row
        for d in range(0, dim, 32):
            v, c = values + 4 * d, o + 4 * d
            if rows - done > 16:
                multiply_tiles(2, w, w_row, v, v + 64, row, distance, blocks, c, row, ahead, 0)
            else:
                multiply_tiles(1, w, w_row, v, v + 64, row, distance, blocks, c, row, ahead, 0)


@njit(error_model="numpy")
def scale_rows(rows: int, out: Address, dim: int, alpha: Address) -> None:
    factors = carray(view(alpha, np.float32(0)), rows)
    for r in range(rows):
        if factors[r] != np.float32(1.0):
            for d in range(0, dim, LANES):
                scale_lanes(out + 4 * (r * dim + d), alpha + 4 * r)


@njit(error_model="numpy")
def copy_keys(values: Address, keys: int, dim: int, target: Address) -> None:
    """A block's first keys, zeros behind: a tile multiplies all 32, and what lies there may be another's NaN."""
    pairs, clean = carray(view(values, np.uint32(0)), 16 * dim), carray(view(target, np.uint32(0)), 16 * dim)
    whole = keys // 2 * dim
    for i in range(whole):
        clean[i] = pairs[i]
    clean[whole:] = np.uint32(0)
    if keys % 2:
        for i in range(whole, whole + dim):
            clean[i] = pairs[i] & np.uint32(0xFFFF)
