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
from myserve.engine.kernels.lanes import next_item, next_thread, size_of, view
from myserve.engine.kernels.launch import Kernel, fingerprint

__all__ = ["CHANNELS", "CONVOLVE", "convolution_kernel", "scratch_bytes"]

CHANNELS = 256  # of an item of work

Kind = Any  # a value whose type is an element's: uint16 (bfloat16's bits) or float32
Record = Any  # CONVOLVE

# Addresses; strides in bytes; counts. A state is [slots, taps - 1, channels].
CONVOLVE = (
    "x", "x_row", "weight", "bias", "out", "states", "read", "write", "starts", "lens", "requests", "rows",
    "channels", "taps", "is_silu", "scratch", "scratch_thread",
)  # fmt: skip


def scratch_bytes(taps: int) -> int:
    """Return what a thread keeps: the weights of an item's channels, tap by tap, their biases and their sums."""
    return 4 * CHANNELS * (taps + 2) + 64


@njit(error_model="numpy")
def _prepare(a: Record, kind: Kind, first: int, width: int, weights: Any, biases: Any) -> None:
    weight = carray(view(a.weight, kind), a.channels * a.taps)
    for j in range(a.taps):
        for c in range(width):
            weights[j * CHANNELS + c] = wide(weight[(first + c) * a.taps + j])
    if a.bias != 0:
        bias = carray(view(a.bias, kind), a.channels)
        for c in range(width):
            biases[c] = wide(bias[first + c])
    else:
        for c in range(width):
            biases[c] = np.float32(0.0)


@njit(error_model="numpy")
def _add_tap(kind: Kind, weights: Any, j: int, x: Any, width: int, sums: Any) -> None:
    for c in range(width):
        sums[c] = fused(weights[j * CHANNELS + c], wide(x[c]), sums[c])


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
def _convolve_channels(
    a: Record, kind: Kind, first: int, width: int, begin: int, end: int, state: int, left: int, scratch: int
) -> None:
    """One request's rows of some channels; `state` to read or 0, `left` to leave or 0."""
    f32, size = np.float32(0), size_of(kind)
    weights = carray(view(scratch, f32), CHANNELS * a.taps)
    biases = carray(view(scratch + 4 * CHANNELS * a.taps, f32), CHANNELS)
    sums = carray(view(scratch + 4 * CHANNELS * (a.taps + 1), f32), CHANNELS)
    _prepare(a, kind, first, width, weights, biases)
    for row in range(begin, end):
        for c in range(width):
            sums[c] = biases[c]
        for j in range(a.taps):
            at = _row(a, kind, row - a.taps + 1 + j, begin, state, first)
            if at != 0:
                _add_tap(kind, weights, j, carray(view(at, kind), width), width, sums)
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
    """One thread's share of (request, channels), and of padding rows, which come out as zeros."""
    starts = carray(view(a.starts, np.int32(0)), a.requests + 1)
    lens = carray(view(a.lens, np.int32(0)), a.requests)
    read = carray(view(a.read, np.int32(0)), a.requests)
    write = carray(view(a.write, np.int32(0)), a.requests)
    slot_bytes = (a.taps - 1) * a.channels * size_of(kind)
    shares = (a.channels + CHANNELS - 1) // CHANNELS
    scratch = a.scratch + next_thread(a) * a.scratch_thread
    items, last = a.requests * shares, starts[a.requests]
    item = next_item(a)
    while item < items + a.rows - last:
        if item >= items:
            out = carray(view(a.out + (last + item - items) * a.channels * size_of(kind), kind), a.channels)
            for c in range(a.channels):
                out[c] = rounded(kind, np.float32(0.0))
        else:
            request, first = item // shares, item % shares * CHANNELS
            begin, end = starts[request], starts[request + 1]
            state = left = 0
            if lens[request] != end - begin:
                state = a.states + read[request] * slot_bytes
            if write[request] >= 0:
                left = a.states + write[request] * slot_bytes
            if begin < end:
                width = min(CHANNELS, a.channels - first)
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
