"""Reductions of a row of scores, compiled: its maximum, its weights and their mass, the maxima of its blocks.

In loops that the compiler makes vectors of. No fast-math: it would let the compiler change the bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from myserve.core.compiled.scalar_math import (
    BLOCK,
    HALF_BITS,
    INFINITY,
    INFINITY_BITS,
    LOWEST_KEY,
    MAGNITUDE,
    MASS_ONE,
    SIGN_SHIFT,
    ZERO,
    compiled,
    exp,
    largest_of_block,
)

__all__ = [
    "block_maxima",
    "drop_masked",
    "exponentials",
    "first_index",
    "largest_score",
    "mass_of",
    "only_masks",
    "scale",
    "weigh",
    "weigh_few",
    "weigh_only",
    "widen",
]

# Scores between two loops over the same memory: 32 KiB of scores and weights stay in a core's first-level cache.
CHUNK = 4096


@compiled
def largest_score(scores: Any) -> Any:
    """Return the maximum; NaN if any score is NaN."""
    # Over integers that order as the floats do: those the compiler may reorder, and so put into vectors.
    all_bits = scores.view(np.int32)
    top, magnitude = LOWEST_KEY, np.int32(0)
    for i in range(len(scores)):
        bits = all_bits[i]
        key = np.int32(bits ^ ((bits >> SIGN_SHIFT) & MAGNITUDE))
        if key > top:
            top = key
        if bits & MAGNITUDE > magnitude:
            magnitude = np.int32(bits & MAGNITUDE)
    result = np.empty(1, np.int32)
    result[0] = top ^ ((top >> SIGN_SHIFT) & MAGNITUDE)
    return np.float32(math.nan) if magnitude > INFINITY_BITS else result.view(np.float32)[0]


@compiled
def exponentials(scores: Any, largest: Any, weights: Any) -> None:
    """Fill `weights` with exp(score - largest)."""
    for i in range(len(scores)):
        weights[i] = exp(scores[i] - largest)


@compiled
def widen(halves: Any, scores: Any) -> None:
    """Fill `scores` with the numbers whose bfloat16 bits are `halves`, int16."""
    bits = scores.view(np.int32)
    for i in range(len(halves)):
        bits[i] = np.int32(halves[i]) << HALF_BITS


@compiled
def first_index(scores: Any, value: Any) -> Any:
    """Return the first index of a score that is there."""
    for start in range(0, len(scores), CHUNK):
        stop = min(start + CHUNK, len(scores))
        hits = np.int32(0)
        for i in range(start, stop):
            hits += np.int32(scores[i] == value)
        if hits > 0:
            while scores[start] != value:
                start += 1
            return start
    return len(scores)


@compiled
def weigh(scores: Any, largest: Any, weights: Any) -> Any:
    """Fill `weights`; return their mass in quanta."""
    total = np.int64(0)
    for start in range(0, len(scores), CHUNK):
        stop = min(start + CHUNK, len(scores))
        exponentials(scores[start:stop], largest, weights[start:stop])
        # in a loop of its own: mixed widths would spoil the vectors of the first
        total += mass_of(weights[start:stop])
    return total


@compiled
def weigh_only(scores: Any, largest: Any, some: Any) -> Any:
    """Return what `weigh` does and keep no weights; `some`: memory for CHUNK of them, or for all."""
    total = np.int64(0)
    for start in range(0, len(scores), CHUNK):
        part = scores[start : min(start + CHUNK, len(scores))]
        exponentials(part, largest, some[: len(part)])
        total += mass_of(some[: len(part)])
    return total


@compiled
def mass_of(weights: Any) -> Any:
    """Return the mass of `weights` in quanta."""
    total = np.int64(0)
    for i in range(len(weights)):
        total += np.int64(weights[i] * MASS_ONE)
    return total


@compiled
def block_maxima(scores: Any) -> Any:
    """Return the largest score of each block."""
    whole, rest = divmod(len(scores), BLOCK)
    all_bits = scores.view(np.int32)
    maxima = np.empty(whole + (rest > 0), np.int32)
    for b in range(whole):
        maxima[b] = largest_of_block(all_bits, b * BLOCK)
    if rest > 0:
        maxima[whole] = LOWEST_KEY
        for i in range(whole * BLOCK, len(scores)):
            bits = all_bits[i]
            maxima[whole] = max(maxima[whole], np.int32(bits ^ ((bits >> SIGN_SHIFT) & MAGNITUDE)))
    for b in range(len(maxima)):
        maxima[b] ^= (maxima[b] >> SIGN_SHIFT) & MAGNITUDE
    return maxima.view(np.float32)


@compiled
def only_masks(raw: Any, edited: Any) -> Any:
    """Return whether every edited score is the raw one, or -inf."""
    others = np.int32(0)
    for i in range(len(raw)):
        others += np.int32((edited[i] != raw[i]) & (edited[i] != -INFINITY))
    return others == 0


@compiled
def drop_masked(edited: Any, weights: Any) -> Any:
    """Set the weights of scores at -inf to 0; return the mass that stays: in quanta, what `weigh` would find."""
    for i in range(len(edited)):
        weights[i] = ZERO if edited[i] == -INFINITY else weights[i]
    return mass_of(weights)


@compiled
def weigh_few(scores: Any, largest: Any, weights: Any) -> Any:
    """Do what `weigh` does where whole blocks may be at -inf: they take no exponentials."""
    maxima = block_maxima(scores)
    b = 0
    while b < len(maxima):
        first, empty = b, maxima[b] == -INFINITY
        while b < len(maxima) and (maxima[b] == -INFINITY) == empty:
            b += 1
        start, stop = first * BLOCK, min(b * BLOCK, len(scores))
        if empty:
            weights[start:stop] = ZERO
        else:
            exponentials(scores[start:stop], largest, weights[start:stop])
    return mass_of(weights)


@compiled
def scale(scores: Any, temperature: Any, largest: Any, out: Any) -> None:
    """Divide by the temperature, as `stages.apply_temperature` does."""
    shift = ZERO if abs(largest / temperature) < INFINITY else largest
    for i in range(len(scores)):
        out[i] = (scores[i] - shift) / temperature
