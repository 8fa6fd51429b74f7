"""Mamba-1's selective scan, token by token: each channel has a state of its own, which decays by its own step in time.

    dt = softplus(step + bias),   S[s, c] = exp(rate[c, s] * dt[c]) * S[s, c] + key[s] * dt[c] * x[c]
    out[c] = (sum over s of query[s] * S[s, c] + skip[c] * x[c]) * silu(gate[c])

Channels are columns of a state, and never meet (`columns`). A step reads one slot and leaves another (`recurrence`).
Steps and gates are rounded to the rows' type where transformers' layers round them; the state and its sums are float32.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from myserve.engine.kernels.elements.activations import exp_of_negative, silu, softplus
from myserve.engine.kernels.elements.pointwise import element_kind, rounded, wide
from myserve.engine.kernels.lanes import next_item, next_thread, size_of, view
from myserve.engine.kernels.launch import Kernel, fingerprint
from myserve.engine.kernels.recurrent.columns import scan_columns

__all__ = ["CHANNELS", "SCAN", "scratch_bytes", "selective_scan_kernel"]

CHANNELS = 64  # of an item of work, and of a tile of a state

Kind = Any  # a value whose type is an element's: uint16 (bfloat16's bits) or float32
Record = Any  # SCAN

# Addresses; strides in bytes; counts. `size`: numbers that a channel's state has. A state is
# [slots, tiles, size, CHANNELS] of float32.
SCAN = (
    "x", "x_row", "step", "step_row", "gate", "gate_row", "key", "key_row", "query", "query_row", "rate", "bias",
    "skip", "out", "states", "read", "write", "starts", "lens", "requests", "rows", "channels", "size", "scratch",
    "scratch_thread",
)  # fmt: skip


def scratch_bytes(size: int) -> int:
    """Return what a thread keeps: rates, decays and a state of no slot; keys and queries; five rows of channels."""
    return 4 * (3 * size * CHANNELS + 2 * size + 5 * CHANNELS) + 64


@njit(error_model="numpy")
def _prepare(a: Record, first: int, width: int, rates: Any, biases: Any, skips: Any) -> None:
    """Rates [size, CHANNELS], biases and skips of a tile's channels; zeros behind its last."""
    f32 = np.float32(0)
    rate, bias = carray(view(a.rate, f32), a.channels * a.size), carray(view(a.bias, f32), a.channels)
    skip = carray(view(a.skip, f32), a.channels)
    for c in range(CHANNELS):
        inside = c < width
        biases[c] = bias[first + c] if inside else f32
        skips[c] = skip[first + c] if inside else f32
        for s in range(a.size):
            rates[s * CHANNELS + c] = rate[(first + c) * a.size + s] if inside else f32


@njit(error_model="numpy")
def _widen(kind: Kind, source: int, width: int, target: Any) -> None:
    x = carray(view(source, kind), width)
    for d in range(width):
        target[d] = wide(x[d])


@njit(error_model="numpy")
def _steps(kind: Kind, source: int, biases: Any, width: int, steps: Any) -> None:
    """softplus(step + bias), rounded after each as a model's own operations are."""
    step = carray(view(source, kind), width)
    for c in range(width):
        moved = wide(rounded(kind, wide(step[c]) + wide(rounded(kind, biases[c]))))
        steps[c] = wide(rounded(kind, softplus(kind, moved)))


@njit(error_model="numpy")
def _decays(rates: Any, steps: Any, size: int, decays: Any) -> None:
    for s in range(size):
        at = s * CHANNELS
        for c in range(CHANNELS):
            decays[at + c] = exp_of_negative(rates[at + c] * steps[c])


@njit(error_model="numpy")
def _multiply(kind: Kind, steps: Any, source: int, width: int, deltas: Any) -> None:
    x = carray(view(source, kind), width)
    for c in range(width):
        deltas[c] = steps[c] * wide(x[c])


@njit(error_model="numpy")
def _write_out(kind: Kind, x_at: int, gate_at: int, out_at: int, read: Any, skips: Any, width: int) -> None:
    x, gate, out = (
        carray(view(x_at, kind), width),
        carray(view(gate_at, kind), width),
        carray(view(out_at, kind), width),
    )
    for c in range(width):
        whole = read[c] + skips[c] * wide(x[c])
        out[c] = rounded(kind, whole * wide(rounded(kind, silu(kind, wide(gate[c])))))


@njit(error_model="numpy")
def _scan_channels(
    a: Record, kind: Kind, first: int, begin: int, end: int, source: int, target: int, scratch: int
) -> None:
    """One request's rows of one tile, whose rates, biases and skips lie prepared."""
    f32, size, tile = np.float32(0), size_of(kind), a.size * CHANNELS
    width = min(CHANNELS, a.channels - first)
    at_rates, at_decays = scratch, scratch + 4 * tile
    at_rows = scratch + 12 * tile
    at_deltas, at_read = at_rows + 12 * CHANNELS, at_rows + 16 * CHANNELS
    at_keys = at_rows + 20 * CHANNELS
    at_queries = at_keys + 4 * a.size
    rates, decays = carray(view(at_rates, f32), tile), carray(view(at_decays, f32), tile)
    biases, skips = (
        carray(view(at_rows, f32), CHANNELS),
        carray(view(at_rows + 4 * CHANNELS, f32), CHANNELS),
    )
    steps = carray(view(at_rows + 8 * CHANNELS, f32), CHANNELS)
    deltas, read = carray(view(at_deltas, f32), CHANNELS), carray(view(at_read, f32), CHANNELS)
    keys, queries = carray(view(at_keys, f32), a.size), carray(view(at_queries, f32), a.size)
    for c in range(CHANNELS):
        steps[c] = deltas[c] = f32
    for row in range(begin, end):
        x = a.x + row * a.x_row + first * size
        _steps(kind, a.step + row * a.step_row + first * size, biases, width, steps)
        _decays(rates, steps, a.size, decays)
        _multiply(kind, steps, x, width, deltas)
        _widen(kind, a.key + row * a.key_row, a.size, keys)
        _widen(kind, a.query + row * a.query_row, a.size, queries)
        scan_columns(4, source, target, a.size, at_decays, at_keys, at_deltas, at_queries, at_read)
        gate, out = a.gate + row * a.gate_row + first * size, a.out + (row * a.channels + first) * size
        _write_out(kind, x, gate, out, read, skips, width)
        source = target


@njit(error_model="numpy")
def _clear(address: int, count: int) -> None:
    """Write `count` bytes of zeros."""
    memory = carray(view(address, np.uint16(0)), count // 2)
    for i in range(count // 2):
        memory[i] = np.uint16(0)


@njit(error_model="numpy")
def _scan(a: Record, kind: Kind) -> None:
    """One thread's share of (tile, request), and of padding rows, which come out as zeros."""
    f32 = np.float32(0)
    starts = carray(view(a.starts, np.int32(0)), a.requests + 1)
    lens = carray(view(a.lens, np.int32(0)), a.requests)
    read = carray(view(a.read, np.int32(0)), a.requests)
    write = carray(view(a.write, np.int32(0)), a.requests)
    tiles = (a.channels + CHANNELS - 1) // CHANNELS
    tile_bytes = 4 * a.size * CHANNELS
    slot_bytes, row_bytes = tiles * tile_bytes, a.channels * size_of(kind)
    scratch = a.scratch + next_thread(a) * a.scratch_thread
    rates = carray(view(scratch, f32), a.size * CHANNELS)
    biases = carray(view(scratch + 3 * tile_bytes, f32), CHANNELS)
    skips = carray(view(scratch + 3 * tile_bytes + 4 * CHANNELS, f32), CHANNELS)
    items, last, prepared = a.requests * tiles, starts[a.requests], -1
    item = next_item(a)
    while item < items + a.rows - last:
        if item >= items:
            _clear(a.out + (last + item - items) * row_bytes, row_bytes)
        else:
            tile, request = item // a.requests, item % a.requests
            begin, end = starts[request], starts[request + 1]
            if tile != prepared:  # a thread's next item is mostly of the tile that it has
                first = tile * CHANNELS
                _prepare(a, first, min(CHANNELS, a.channels - first), rates, biases, skips)
                prepared = tile
            # of no slot: in scratch
            target = scratch + 2 * tile_bytes
            if write[request] >= 0:
                target = a.states + write[request] * slot_bytes + tile * tile_bytes
            source = target
            if lens[request] == end - begin:
                if begin < end:
                    _clear(target, tile_bytes)
            else:
                source = a.states + read[request] * slot_bytes + tile * tile_bytes
            _scan_channels(a, kind, tile * CHANNELS, begin, end, source, target, scratch)
        item = next_item(a)


@functools.cache
def selective_scan_kernel(dtype: torch.dtype) -> Kernel:
    """Return the entry point for rows of one element type."""
    source, kind = fingerprint(), element_kind(dtype)

    def scan(p: Any) -> None:
        if source >= 0:
            _scan(carray(p, 1)[0], kind)

    return Kernel(SCAN, scan)
