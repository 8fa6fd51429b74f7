"""Linear recurrences, token by token: the gated delta rule, KDA, Mamba-2's scan and lightning attention are one loop.

A head's state S [K, V] is multiplied by a decay, takes in one token, and is read by one query:

    S = exp(g) * S + k * d,   d = beta * v, or beta * (v - k^T exp(g) S) by the delta rule,   out = q^T S (+ skip * v)

The first token of a step reads one slot of the cache, and the last leaves another: nothing that a step reads is
written by it, so a step that is run again gives the same.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from myserve.engine.kernels.elements.activations import exp_of_negative
from myserve.engine.kernels.elements.pointwise import element_kind, rounded, wide
from myserve.engine.kernels.lanes import LANES, next_item, next_thread, size_of, sum_of_squares, view
from myserve.engine.kernels.launch import Kernel, fingerprint
from myserve.engine.kernels.recurrent.columns import read_columns, stream_columns, write_columns

__all__ = ["RECUR", "recurrence_kernel", "scratch_bytes", "tile_columns"]

Kind = Any  # a value whose type is an element's: uint16 (bfloat16's bits) or float32
Record = Any  # RECUR

# Addresses; strides in bytes; counts. A state is [slots, heads, tiles, key_dim, columns] of float32.
RECUR = (
    "query", "query_row", "query_head", "key", "key_row", "key_head", "value", "value_row", "value_head",
    "decay", "decay_row", "decay_head", "decays", "beta", "beta_row", "skip", "out", "out_is_wide", "states", "read",
    "write", "starts", "lens", "requests", "rows", "heads", "key_heads", "key_dim", "value_dim", "columns", "tiles",
    "is_delta", "is_normed", "scale", "eps", "scratch", "scratch_thread",
)  # fmt: skip


def tile_columns(value_dim: int) -> int:
    """Return how many columns of a state lie together: the widest of 64, 48, 32 and 16 that leaves the least over.

    >>> [tile_columns(n) for n in (128, 64, 80, 96, 24, 5)]
    [64, 64, 16, 48, 32, 16]
    """
    whole = -(-value_dim // LANES) * LANES
    return next(width for width in (64, 48, 32, 16) if whole % width == 0)


def scratch_bytes(key_dim: int, columns: int) -> int:
    """Return what a thread keeps beside the state: four rows of keys, three of columns, and a state of no slot."""
    return 4 * (4 * _padded(key_dim) + 3 * columns + key_dim * columns) + 64


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES


@njit(error_model="numpy")
def _widen(kind: Kind, source: int, width: int, factor: np.float32, target: Any) -> None:
    x = carray(view(source, kind), width)
    for d in range(width):
        target[d] = wide(x[d]) * factor


@njit(error_model="numpy")
def _inverse_norm(a: Record, kind: Kind, source: int) -> Any:
    if a.is_normed == 0:
        return np.float32(1.0)
    return np.float32(1.0) / np.sqrt(sum_of_squares(kind, source, a.key_dim) + a.eps)


@njit(error_model="numpy")
def _read(columns: int, state: int, rows: int, factors: int, out: int) -> None:
    if columns == 64:
        read_columns(4, state, rows, factors, out)
    elif columns == 48:
        read_columns(3, state, rows, factors, out)
    elif columns == 32:
        read_columns(2, state, rows, factors, out)
    else:
        read_columns(1, state, rows, factors, out)


@njit(error_model="numpy")
def _write(
    columns: int,
    source: int,
    target: int,
    rows: int,
    decays: int,
    keys: int,
    deltas: int,
    queries: int,
    out: int,
) -> None:
    if columns == 64:
        write_columns(4, source, target, rows, decays, keys, deltas, queries, out)
    elif columns == 48:
        write_columns(3, source, target, rows, decays, keys, deltas, queries, out)
    elif columns == 32:
        write_columns(2, source, target, rows, decays, keys, deltas, queries, out)
    else:
        write_columns(1, source, target, rows, decays, keys, deltas, queries, out)


@njit(error_model="numpy")
def _stream(
    columns: int,
    source: int,
    target: int,
    rows: int,
    decays: int,
    keys: int,
    deltas: int,
    queries: int,
    out: int,
) -> None:
    if columns == 64:
        stream_columns(4, source, target, rows, decays, keys, deltas, queries, out)
    elif columns == 48:
        stream_columns(3, source, target, rows, decays, keys, deltas, queries, out)
    elif columns == 32:
        stream_columns(2, source, target, rows, decays, keys, deltas, queries, out)
    else:
        stream_columns(1, source, target, rows, decays, keys, deltas, queries, out)


@njit(error_model="numpy")
def _exp_row(decay: Any, count: int, width: int, target: Any) -> None:
    """The factors [width] that a state's rows keep of themselves: one for each, or one for all."""
    if count == 1:
        factor = exp_of_negative(decay[0])
        for d in range(width):
            target[d] = factor
    else:
        for d in range(width):
            target[d] = exp_of_negative(decay[d])


@njit(error_model="numpy")
def _multiply(x: Any, y: Any, width: int, target: Any) -> None:
    for d in range(width):
        target[d] = x[d] * y[d]


@njit(error_model="numpy")
def _recur_head(
    a: Record, kind: Kind, head: int, tile: int, begin: int, end: int, source: int, target: int, scratch: int
) -> None:
    """One request's tokens through one tile of one head."""
    f32, dim, columns = np.float32(0), a.key_dim, a.columns
    padded = (dim + LANES - 1) // LANES * LANES * 4
    at_query, at_key, at_decay, at_kept = (
        scratch,
        scratch + padded,
        scratch + 2 * padded,
        scratch + 3 * padded,
    )
    at_delta, at_read = scratch + 4 * padded, scratch + 4 * padded + 4 * columns
    query, key = carray(view(at_query, f32), dim), carray(view(at_key, f32), dim)
    decay, kept = carray(view(at_decay, f32), dim), carray(view(at_kept, f32), dim)
    delta, read = carray(view(at_delta, f32), columns), carray(view(at_read, f32), columns)
    first = tile * columns
    width = min(columns, a.value_dim - first)
    key_head = head // (a.heads // a.key_heads)
    betas = carray(view(a.beta, f32), a.rows * a.heads)
    skip = np.float32(0.0)
    if a.skip != 0:
        skip = carray(view(a.skip, f32), a.heads)[head]
    for d in range(columns):
        delta[d] = np.float32(0.0)
    # a decode's: it is read again in the next step, when the weights have swept the caches
    streams = end - begin == 1 and target % 64 == 0
    for row in range(begin, end):
        query_at = a.query + row * a.query_row + key_head * a.query_head
        key_at = a.key + row * a.key_row + key_head * a.key_head
        _widen(kind, query_at, dim, _inverse_norm(a, kind, query_at) * a.scale, query)
        _widen(kind, key_at, dim, _inverse_norm(a, kind, key_at), key)
        decays = carray(view(a.decay + row * a.decay_row + head * a.decay_head, f32), a.decays)
        _exp_row(decays, a.decays, dim, decay)
        value = carray(view(a.value + row * a.value_row + head * a.value_head, kind), first + width)
        beta = betas[row * a.heads + head]
        if a.is_delta != 0:
            _multiply(decay, key, dim, kept)
            _read(columns, source, dim, at_kept, at_read)
            for d in range(width):
                delta[d] = beta * (wide(value[first + d]) - read[d])
        else:
            for d in range(width):
                delta[d] = beta * wide(value[first + d])
        if streams:
            _stream(columns, source, target, dim, at_decay, at_key, at_delta, at_query, at_read)
        else:
            _write(columns, source, target, dim, at_decay, at_key, at_delta, at_query, at_read)
        _write_out(a, kind, (row * a.heads + head) * a.value_dim + first, read, value, first, width, skip)
        source = target


@njit(error_model="numpy")
def _write_out(
    a: Record, kind: Kind, at: int, read: Any, value: Any, first: int, width: int, skip: np.float32
) -> None:
    if a.skip != 0:
        for d in range(width):
            read[d] += skip * wide(value[first + d])
    if a.out_is_wide != 0:
        out = carray(view(a.out + 4 * at, np.float32(0)), width)
        for d in range(width):
            out[d] = read[d]
    else:
        narrow = carray(view(a.out + size_of(kind) * at, kind), width)
        for d in range(width):
            narrow[d] = rounded(kind, read[d])


@njit(error_model="numpy")
def _clear(address: int, count: int) -> None:
    """Write `count` bytes of zeros."""
    memory = carray(view(address, np.uint16(0)), count // 2)
    for i in range(count // 2):
        memory[i] = np.uint16(0)


@njit(error_model="numpy")
def _recur(a: Record, kind: Kind) -> None:
    """One thread's share of (request, head, tile), and of padding rows, which come out as zeros."""
    starts = carray(view(a.starts, np.int32(0)), a.requests + 1)
    lens = carray(view(a.lens, np.int32(0)), a.requests)
    read = carray(view(a.read, np.int32(0)), a.requests)
    write = carray(view(a.write, np.int32(0)), a.requests)
    tile_bytes = 4 * a.key_dim * a.columns
    slot_bytes = a.heads * a.tiles * tile_bytes
    row_bytes = a.heads * a.value_dim * (4 if a.out_is_wide != 0 else size_of(kind))
    scratch = a.scratch + next_thread(a) * a.scratch_thread
    items, last = a.requests * a.heads * a.tiles, starts[a.requests]
    item = next_item(a)
    while item < items + a.rows - last:
        if item >= items:
            _clear(a.out + (last + item - items) * row_bytes, row_bytes)
        else:
            request, part = item // (a.heads * a.tiles), item % (a.heads * a.tiles)
            begin, end = starts[request], starts[request + 1]
            # of no slot: in scratch, behind the rows
            target = scratch + a.scratch_thread - tile_bytes
            if write[request] >= 0:
                target = a.states + write[request] * slot_bytes + part * tile_bytes
            source = target
            if lens[request] == end - begin:
                if begin < end:
                    _clear(target, tile_bytes)
            else:
                source = a.states + read[request] * slot_bytes + part * tile_bytes
            _recur_head(a, kind, part // a.tiles, part % a.tiles, begin, end, source, target, scratch)
        item = next_item(a)


@functools.cache
def recurrence_kernel(dtype: torch.dtype) -> Kernel:
    """Return the entry point for queries, keys and values of one element type."""
    source, kind = fingerprint(), element_kind(dtype)

    def recur(p: Any) -> None:
        if source >= 0:
            _recur(carray(p, 1)[0], kind)

    return Kernel(RECUR, recur)
