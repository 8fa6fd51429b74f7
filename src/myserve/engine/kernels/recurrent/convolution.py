"""Short causal convolutions along a sequence, a channel on its own: what stands before a recurrence, or in its place.

    out[t, c] = act(bias[c] + sum over taps j of weight[c, j] * x[t - taps + 1 + j, c])

The last taps - 1 rows of a request are its state, read from one slot and left in another, as in `recurrence`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from myserve.engine.kernels.elements.activations import silu
from myserve.engine.kernels.elements.pointwise import element_kind, fused, rounded, wide
from myserve.engine.kernels.lanes import LANES, next_item, next_thread, size_of, view
from myserve.engine.kernels.launch import Kernel, fingerprint
from myserve.engine.kernels.recurrent.taps import add_tap, spread_taps, sum_taps

__all__ = ["CHANNELS", "CONVOLVE", "convolution_kernel", "scratch_bytes"]

CHANNELS = 256  # of an item of work
TAPS = 4  # what models have: then a group of channels stays in a register while its taps are added

Kind = Any  # a value whose type is an element's: uint16 (bfloat16's bits) or float32
Record = Any  # CONVOLVE

# Addresses; strides in bytes; counts. A state is [slots, taps - 1, channels].
CONVOLVE = (
    "x", "x_row", "weight", "bias", "out", "states", "read", "write", "starts", "lens", "requests", "rows",
    "channels", "taps", "is_silu", "scratch", "scratch_thread",
)  # fmt: skip


def scratch_bytes(taps: int) -> int:
    """Return what a thread keeps: an item's weights, tap by tap, its biases and sums, and the places of four rows."""
    return 4 * CHANNELS * (taps + 2) + 8 * TAPS + 64


@njit(error_model="numpy")
def _prepare(a: Record, kind: Kind, first: int, width: int, scratch: int) -> None:
    """Lay out an item's weights [taps, CHANNELS] and biases [CHANNELS] as float32."""
    f32, size = np.float32(0), size_of(kind)
    weights = carray(view(scratch, f32), CHANNELS * a.taps)
    biases = carray(view(scratch + 4 * CHANNELS * a.taps, f32), CHANNELS)
    weight = carray(view(a.weight, kind), a.channels * a.taps)
    whole = 0
    if a.taps == TAPS:
        whole = width // LANES * LANES
        spread_taps(kind, 4, whole // LANES, a.weight + first * 4 * size, scratch, 4 * CHANNELS)
    for j in range(a.taps):
        for c in range(whole, width):
            weights[j * CHANNELS + c] = wide(weight[(first + c) * a.taps + j])
    for c in range(width):
        biases[c] = f32
    if a.bias != 0:
        bias = carray(view(a.bias, kind), a.channels)
        for c in range(width):
            biases[c] = wide(bias[first + c])


@njit(error_model="numpy")
def _add_tap(kind: Kind, weights: int, x: int, begun: int, width: int, sums: int) -> None:
    """Add one tap to the sums of channels begun .. width."""
    f32, groups = np.float32(0), (width - begun) // LANES
    add_tap(kind, groups, weights + 4 * begun, x + size_of(kind) * begun, sums + 4 * begun)
    factors, totals = carray(view(weights, f32), width), carray(view(sums, f32), width)
    elements = carray(view(x, kind), width)
    for c in range(begun + groups * LANES, width):
        totals[c] = fused(factors[c], wide(elements[c]), totals[c])


@njit(error_model="numpy")
def _finish(kind: Kind, sums: Any, width: int, is_silu: bool, out: Any) -> None:
    if is_silu:
        for c in range(width):
            out[c] = rounded(kind, silu(kind, sums[c]))
    else:
        for c in range(width):
            out[c] = rounded(kind, sums[c])


@njit(error_model="numpy")
def _row(a: Record, kind: Kind, place: int, begin: int, state: int, first: int) -> Any:
    """The address of an input row's channels: a row of this step, or of the state; 0 before the first token."""
    size = size_of(kind)
    if place >= begin:
        return a.x + place * a.x_row + first * size
    if state == 0:
        return 0
    return state + ((place - begin + a.taps - 1) * a.channels + first) * size


@njit(error_model="numpy")
def _sum_row(
    a: Record, kind: Kind, row: int, begin: int, state: int, first: int, width: int, scratch: int
) -> None:
    """The sums of one row's channels; a tap that meets no row, before the first token, adds nothing."""
    f32, begun = np.float32(0), 0
    at_biases = scratch + 4 * CHANNELS * a.taps
    at_sums = at_biases + 4 * CHANNELS
    at_rows = at_sums + 4 * CHANNELS
    if a.taps == TAPS and (state != 0 or row - begin >= TAPS - 1):
        rows = carray(view(at_rows, np.int64(0)), TAPS)
        for j in range(TAPS):
            rows[j] = _row(a, kind, row - TAPS + 1 + j, begin, state, first)
        sum_taps(kind, 4, width // LANES, scratch, 4 * CHANNELS, at_rows, at_biases, at_sums)
        begun = width // LANES * LANES
    if begun == width:
        return
    biases, sums = carray(view(at_biases, f32), width), carray(view(at_sums, f32), width)
    for c in range(begun, width):
        sums[c] = biases[c]
    for j in range(a.taps):
        at = _row(a, kind, row - a.taps + 1 + j, begin, state, first)
        if at != 0:
            _add_tap(kind, scratch + 4 * CHANNELS * j, at, begun, width, at_sums)


@njit(error_model="numpy")
def _convolve_channels(
    a: Record, kind: Kind, first: int, width: int, begin: int, end: int, state: int, left: int, scratch: int
) -> None:
    """One request's rows of an item's channels, prepared; `state` to read or 0, `left` to leave or 0."""
    f32, size = np.float32(0), size_of(kind)
    sums = carray(view(scratch + 4 * CHANNELS * (a.taps + 1), f32), CHANNELS)
    for row in range(begin, end):
        _sum_row(a, kind, row, begin, state, first, width, scratch)
        out = carray(view(a.out + (row * a.channels + first) * size, kind), width)
        _finish(kind, sums, width, a.is_silu != 0, out)
    if left != 0:
        for j in range(a.taps - 1):
            at = _row(a, kind, end - a.taps + 1 + j, begin, state, first)
            kept = carray(view(left + (j * a.channels + first) * size, kind), width)
            for c in range(width):
                kept[c] = rounded(kind, np.float32(0.0))
            if at != 0:
                x = carray(view(at, kind), width)
                for c in range(width):
                    kept[c] = x[c]


@njit(error_model="numpy")
def _convolve(a: Record, kind: Kind) -> None:
    """One thread's share of (channels, request), and of padding rows, which come out as zeros."""
    starts = carray(view(a.starts, np.int32(0)), a.requests + 1)
    lens = carray(view(a.lens, np.int32(0)), a.requests)
    read = carray(view(a.read, np.int32(0)), a.requests)
    write = carray(view(a.write, np.int32(0)), a.requests)
    slot_bytes = (a.taps - 1) * a.channels * size_of(kind)
    shares = (a.channels + CHANNELS - 1) // CHANNELS
    scratch = a.scratch + next_thread(a) * a.scratch_thread
    items, last, prepared = a.requests * shares, starts[a.requests], -1
    item = next_item(a)
    while item < items + a.rows - last:
        if item >= items:
            out = carray(view(a.out + (last + item - items) * a.channels * size_of(kind), kind), a.channels)
            for c in range(a.channels):
                out[c] = rounded(kind, np.float32(0.0))
        else:
            first, request = item // a.requests * CHANNELS, item % a.requests
            width = min(CHANNELS, a.channels - first)
            if first != prepared:  # a thread's next item is mostly of the channels that it has
                _prepare(a, kind, first, width, scratch)
                prepared = first
            begin, end = starts[request], starts[request + 1]
            state = left = 0
            if lens[request] != end - begin:
                state = a.states + read[request] * slot_bytes
            if write[request] >= 0:
                left = a.states + write[request] * slot_bytes
            if begin < end:
                _convolve_channels(a, kind, first, width, begin, end, state, left, scratch)
        item = next_item(a)


@functools.cache
def convolution_kernel(dtype: torch.dtype) -> Kernel:
    """Return the entry point for rows and weights of one element type."""
    source, kind = fingerprint(), element_kind(dtype)

    def convolve(p: Any) -> None:
        if source >= 0:
            _convolve(carray(p, 1)[0], kind)

    return Kernel(CONVOLVE, convolve)
