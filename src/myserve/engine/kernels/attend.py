"""Attention's loops: a query row's numbers are a function of its own keys, whatever is computed beside it.

The order of sums is fixed by `lanes`. Here stands which rows share a tile and which thread takes which tile; none of
that shows in the bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from myserve.engine.kernels.attention_tiles import copy_keys, mix_by_tiles, scale_rows, scores_by_tiles
from myserve.engine.kernels.dots import mix, multiply
from myserve.engine.kernels.lanes import (
    BFLOAT16_BY_LANES,
    BFLOAT16_BY_PAIRS,
    BFLOAT16_BY_TILES,
    FLOAT32,
    LANES,
    PARTITION,
    divide_and_round,
    lane_sum,
    next_item,
    next_thread,
    size_of,
    stays_half,
    uses_tiles,
    view,
    widen,
)
from myserve.engine.kernels.lanes import BLOCK_SIZE as BLOCK_SIZE
from myserve.engine.kernels.launch import Kernel, fingerprint
from myserve.engine.kernels.softmax import softmax_step
from myserve.engine.kernels.tiles import Unit, bfloat16_unit, get_tiles, set_tiles

__all__ = ["ATTEND", "BLOCK_SIZE", "TILE_ROWS", "attend_kernel", "padded", "padded_head_dim"]

TILE_ROWS = 32  # query rows (positions x heads of the group) that one work item carries over its keys

Address = int  # of a byte
Kind = Any  # `lanes.FLOAT32` or one of `lanes.BFLOAT16_BY_...`
Record = Any  # ATTEND

# What a kernel is told: addresses; strides in bytes; counts. Caches are [num_blocks, kv_heads, block]; a block
# of K is [dim, BLOCK_SIZE], of V [BLOCK_SIZE, dim]; in bfloat16 two rows lie interleaved: [rows / 2, columns, 2].
ATTEND = (
    "query", "query_token", "query_head", "out", "keys", "values", "tables", "table_row", "query_start",
    "context_lens", "sinks", "scratch", "scratch_bytes", "tokens", "requests", "kv_heads", "group",
    "head_dim", "window", "chunk", "tiles", "scale", "softcap",
)  # fmt: skip


def padded_head_dim(dim: int) -> int:
    """Return the head dimension as the cache has it: whole tiles of 32, zeros behind."""
    return (dim + 2 * LANES - 1) // (2 * LANES) * (2 * LANES)


# for kernels alone: called from Python it would be compiled once more, at every start
padded = njit(error_model="numpy")(padded_head_dim)


@njit(error_model="numpy")
def _scores(
    kind: Kind, rows: int, query: Address, dim: int, keys: Address, scores: Address, ahead: int
) -> None:
    """scores[r, key] = sum over d of query[r, d] * K[d, key], for one partition; `keys`: an address per 16."""
    q_row, s_row, k_row = (2 if stays_half(kind) else 4) * dim, 4 * PARTITION, 4 * BLOCK_SIZE
    for done in range(0, rows, 4):
        q, s = query + done * q_row, scores + done * s_row
        if rows - done > 2:
            multiply(kind, 4, 4, q, q_row, keys, k_row, dim, ahead, s, s_row)
        else:
            multiply(kind, 2, 4, q, q_row, keys, k_row, dim, ahead, s, s_row)


@njit(error_model="numpy")
def _mix(
    kind: Kind, rows: int, weights: Address, v: Address, keys: int, ahead: int, v2: Address, keys2: int,
    ahead2: int, dim: int, out: Address, alpha: Address,
) -> None:  # fmt: skip
    """out[r, d] = alpha[r] * out[r, d] + sum over keys of weights[r, key] * V[key, d], over one or two blocks.

    `v`, `v2`: where the blocks' values lie; `ahead`, `ahead2`: how far from them what is fetched on the way.
    """
    w_row, row = (2 if stays_half(kind) else 4) * PARTITION, 4 * dim
    by_fours, by_eights = 4 * (dim // 64 * 64), 4 * (dim // 128 * 128)
    for done in range(0, rows, 4):
        w, o, f = weights + done * w_row, out + done * row, alpha + 4 * done
        # A tile takes as many columns as its sums leave registers for; its shape is compiled in.
        if rows - done > 2:
            for d in range(0, by_fours, 256):
                mix(kind, 4, 4, w, w_row, v + d, keys, ahead, v2 + d, keys2, ahead2, row, o + d, row, f)
            for d in range(by_fours, 4 * dim, 64):
                mix(kind, 4, 1, w, w_row, v + d, keys, ahead, v2 + d, keys2, ahead2, row, o + d, row, f)
        else:
            for d in range(0, by_eights, 512):
                mix(kind, 2, 8, w, w_row, v + d, keys, ahead, v2 + d, keys2, ahead2, row, o + d, row, f)
            for d in range(by_eights, 4 * dim, 64):
                mix(kind, 2, 1, w, w_row, v + d, keys, ahead, v2 + d, keys2, ahead2, row, o + d, row, f)


@njit(error_model="numpy")
def _copy_row(source: Address, count: int, target: Address) -> None:
    row, copy = carray(view(source, np.int16(0)), count), carray(view(target, np.int16(0)), count)
    for d in range(count):
        copy[d] = row[d]


@njit(error_model="numpy")
def _read_row(kind: Kind, source: Address, count: int, target: Address) -> None:
    whole = count // LANES * LANES
    for d in range(0, whole, LANES):
        widen(kind, 16, source + size_of(kind) * d, target + 4 * d)
    for d in range(whole, count):
        widen(kind, 1, source + size_of(kind) * d, target + 4 * d)


@njit(error_model="numpy")
def _write_row(kind: Kind, source: Address, divisor: np.float32, count: int, target: Address) -> None:
    whole = count // LANES * LANES
    for d in range(0, whole, LANES):
        divide_and_round(kind, 16, source + 4 * d, divisor, target + size_of(kind) * d)
    for d in range(whole, count):
        divide_and_round(kind, 1, source + 4 * d, divisor, target + size_of(kind) * d)


@njit(error_model="numpy")
def _block(a: Record, cache: Address, request: int, head: int, key: int, block_bytes: int) -> Any:
    """Return the address of the block that holds a request's key."""
    table = carray(view(a.tables + request * a.table_row, np.int32(0)), a.table_row // 4)
    return cache + (np.int64(table[key // BLOCK_SIZE]) * a.kv_heads + head) * block_bytes


@njit(error_model="numpy")
def _first_key(a: Record, position: int) -> int:
    """Return the first key that a query sees, which never falls from one position to the next."""
    first = max(0, position + 1 - a.window) if a.window > 0 else 0
    return max(first, position // a.chunk * a.chunk) if a.chunk > 0 else first


@njit(error_model="numpy")
def _scratch(kind: Kind, rows: int, dim: int, scratch: Address) -> Any:
    """Return where a work item's rows lie and how many there is room for: whole register tiles, padded with zeros.

    Behind the four addresses of a partition's keys: peaks, factors and 16 partial sums of each row's softmax; queries;
    outputs; weights rounded to bfloat16; scores; a copy of a block's values with zeros behind its last key.
    """
    whole = 16 if uses_tiles(kind) else 4
    room = (rows + whole - 1) // whole * whole
    peaks = scratch + 64
    alphas = peaks + 4 * room
    totals = alphas + 4 * room
    query = totals + 4 * room * LANES
    out = query + 4 * room * dim
    rounded = out + 4 * room * dim
    scores = rounded + 2 * room * PARTITION
    clean = scores + 4 * room * PARTITION
    return room, peaks, alphas, totals, query, out, rounded, scores, clean


@njit(error_model="numpy")
def _load_queries(a: Record, kind: Kind, head: int, token: int, rows: int, scratch: Address) -> None:
    """Clear an item's state, and copy its query rows behind one another, as the products take them."""
    dim = padded(a.head_dim)
    room, peaks, _, _, query, _, _, _, _ = _scratch(kind, rows, dim, scratch)
    state = carray(view(peaks, np.float32(0)), room * (2 + LANES + 2 * dim + PARTITION // 2))
    state[:] = np.float32(0.0)
    for r in range(rows):
        t, h = token + r // a.group, head * a.group + r % a.group
        source = a.query + t * a.query_token + h * a.query_head
        if stays_half(kind):
            _copy_row(source, a.head_dim, query + 2 * r * dim)
        else:
            _read_row(kind, source, a.head_dim, query + 4 * r * dim)
        state[r] = np.float32(-np.inf)
        if a.sinks != 0:  # a sink is a score without a value: it is there before the first key
            widen(np.float32(0), 1, a.sinks + 4 * h, peaks + 4 * r)
            state[2 * room + LANES * r] = np.float32(1.0)


@njit(error_model="numpy")
def _attend_partition(
    a: Record, kind: Kind, request: int, head: int, key: int, first: int, last: int, position: int, rows: int,
    coming: int, coming_head: int, scratch: Address,
) -> None:  # fmt: skip
    """Take up the keys from `key` on, a partition of them: scores, a step of the online softmax, weighted values.

    The tile's rows, of positions from `position` on, see keys from `first` to `last` at most. On the way the next
    partition's keys are fetched; behind the last one, the first of request `coming` and its `coming_head`.
    """
    context_lens = carray(view(a.context_lens, np.int32(0)), a.requests)
    groups = carray(view(scratch, np.int64(0)), PARTITION // LANES)
    dim = padded(a.head_dim)
    block_bytes = BLOCK_SIZE * dim * size_of(kind)
    _, peaks, alphas, totals, query, out, rounded, scores, clean = _scratch(kind, rows, dim, scratch)
    weights, weight = (rounded, 2) if stays_half(kind) else (scores, 4)
    for g in range(PARTITION // LANES):
        # lanes beyond the end repeat the last ones: read, never weighed
        at = min(key + LANES * g, last - 1)
        groups[g] = _block(a, a.keys, request, head, at, block_bytes) + at % BLOCK_SIZE // LANES * 64
    if uses_tiles(kind):
        scores_by_tiles(rows, query, dim, scratch, scores, a.values - a.keys)
    else:
        _scores(kind, rows, query, dim, scratch, scores, a.values - a.keys)
    for r in range(rows):
        end = position + r // a.group + 1
        begin = _first_key(a, end - 1)
        softmax_step(
            kind, scores + 4 * r * PARTITION, weights + weight * r * PARTITION, begin - key, end - key, a.scale,
            a.softcap, peaks + 4 * r, alphas + 4 * r, totals + 4 * r * LANES,
        )  # fmt: skip
    if uses_tiles(kind):
        scale_rows(rows, out, dim, alphas)
    # blocks below what is seen may be another request's by now
    at, end = max(key, first // BLOCK_SIZE * BLOCK_SIZE), min(key + PARTITION, last)
    keys, keys2 = min(BLOCK_SIZE, end - at), max(0, end - at - BLOCK_SIZE)
    values = _block(a, a.values, request, head, at, block_bytes)
    values2 = _block(a, a.values, request, head, at + BLOCK_SIZE, block_bytes) if keys2 > 0 else values
    if key + PARTITION < last:
        of, head_of, next_at, next_last = request, head, at + PARTITION, last
    else:
        of, head_of, next_at, next_last = coming, coming_head, 0, int(context_lens[coming])
    next_keys = _block(a, a.keys, of, head_of, next_at, block_bytes)
    next_keys2 = _block(a, a.keys, of, head_of, min(next_at + BLOCK_SIZE, next_last - 1), block_bytes)
    mine = weights + weight * (at - key)
    if not uses_tiles(kind):
        _mix(
            kind, rows, mine, values, keys, next_keys - values, values2, keys2, next_keys2 - values2, dim, out,
            alphas,
        )  # fmt: skip
    elif keys2 == BLOCK_SIZE:
        mix_by_tiles(rows, mine, values, 2, values2 - values, dim, out, next_keys - values)
    else:
        if keys2 > 0:
            mix_by_tiles(rows, mine, values, 1, 0, dim, out, next_keys - values)
            mine, values, keys, next_keys = mine + 2 * BLOCK_SIZE, values2, keys2, next_keys2
        if keys < BLOCK_SIZE:
            copy_keys(values, keys, dim, clean)
            values = clean
        mix_by_tiles(rows, mine, values, 1, 0, dim, out, next_keys - values)


@njit(error_model="numpy")
def _write_rows(a: Record, kind: Kind, head: int, token: int, rows: int, scratch: Address) -> None:
    """Divide an item's outputs by the sums of their weights and store them in the model's type."""
    dim = padded(a.head_dim)
    _, _, _, totals, _, out, _, _, _ = _scratch(kind, rows, dim, scratch)
    for r in range(rows):
        t, h = token + r // a.group, head * a.group + r % a.group
        target = a.out + size_of(kind) * (t * a.kv_heads * a.group + h) * a.head_dim
        _write_row(kind, out + 4 * r * dim, lane_sum(totals + 4 * r * LANES), a.head_dim, target)


@njit(error_model="numpy")
def _attend_tile(
    a: Record, kind: Kind, request: int, head: int, tile: int, coming: int, coming_head: int, scratch: Address
) -> None:
    """One work item: some positions of one request, the query rows of one KV head, over all their keys.

    The item that follows is of request `coming` and its `coming_head`, whose first keys are fetched at the end.
    """
    query_start = carray(view(a.query_start, np.int32(0)), a.requests + 1)
    context_lens = carray(view(a.context_lens, np.int32(0)), a.requests)
    step = max(1, TILE_ROWS // a.group)
    token, end_token = query_start[request] + tile * step, query_start[request + 1]
    positions = min(step, end_token - token)
    position = context_lens[request] - (end_token - token)  # of the tile's first row
    rows = positions * a.group
    _load_queries(a, kind, head, token, rows, scratch)
    last = position + positions  # the first key that no row of the tile sees
    first = _first_key(a, position)
    for key in range(first // PARTITION * PARTITION, last, PARTITION):
        _attend_partition(
            a, kind, request, head, key, first, last, position, rows, coming, coming_head, scratch
        )
    _write_rows(a, kind, head, token, rows, scratch)


@njit(error_model="numpy")
def _zero_padding_rows(a: Record, first: int, size: int) -> None:
    row = a.kv_heads * a.group * a.head_dim * size
    carray(view(a.out + first * row, np.uint8(0)), (a.tokens - first) * row)[:] = np.uint8(0)


@njit(error_model="numpy")
def _find(a: Record, item: int, request: int, before: int, step: int) -> Any:
    """An item's request, the items before that request's, its tiles; from a request on whose items `before` precede."""
    query_start = carray(view(a.query_start, np.int32(0)), a.requests + 1)
    tiles = 0
    while request < a.requests:
        tiles = (query_start[request + 1] - query_start[request] + step - 1) // step
        if item < before + tiles * a.kv_heads:
            break
        before += tiles * a.kv_heads
        request += 1
    return request, before, tiles


@njit(error_model="numpy")
def _attend(a: Record, kind: Kind) -> None:
    """One thread's share of the items (request, KV head, tile), the longest tiles of a request first."""
    query_start = carray(view(a.query_start, np.int32(0)), a.requests + 1)
    thread = next_thread(a)
    scratch = a.scratch + a.scratch_bytes * thread
    step = max(1, TILE_ROWS // a.group)
    found = scratch + a.scratch_bytes - 64  # oneDNN relies on finding its own tile configuration again
    if uses_tiles(kind):
        get_tiles(found)
        set_tiles(a.tiles)
    if thread == 0:
        _zero_padding_rows(a, query_start[a.requests], size_of(kind))
    item = next_item(a)
    request, before, tiles = _find(a, item, 0, 0, step)
    while request < a.requests:
        following = next_item(a)
        coming, coming_before, coming_tiles = _find(a, following, request, before, step)
        local, of, head = item - before, request, 0
        if coming < a.requests:
            of, head = coming, (following - coming_before) // coming_tiles
        _attend_tile(a, kind, request, local // tiles, tiles - 1 - local % tiles, of, head, scratch)
        item, request, before, tiles = following, coming, coming_before, coming_tiles
    if uses_tiles(kind):
        set_tiles(found)


@functools.cache
def attend_kernel(dtype: torch.dtype, unit: Unit | None = None) -> Kernel:
    """The entry point for caches of one element type; bfloat16 on `unit`, or on the best of this machine."""
    source = fingerprint()

    def attend_lanes(p: Any) -> None:
        if source >= 0:
            _attend(carray(p, 1)[0], BFLOAT16_BY_LANES)

    def attend_pairs(p: Any) -> None:
        if source >= 0:
            _attend(carray(p, 1)[0], BFLOAT16_BY_PAIRS)

    def attend_tiles(p: Any) -> None:
        if source >= 0:
            _attend(carray(p, 1)[0], BFLOAT16_BY_TILES)

    def attend_float32(p: Any) -> None:
        if source >= 0:
            _attend(carray(p, 1)[0], FLOAT32)

    if dtype == torch.float32:
        return Kernel(ATTEND, attend_float32)
    chosen = {"tiles": attend_tiles, "pairs": attend_pairs, "lanes": attend_lanes}
    return Kernel(ATTEND, chosen[unit or bfloat16_unit()])
