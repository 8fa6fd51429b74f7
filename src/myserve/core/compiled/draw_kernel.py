"""The draw of a CPU row in few passes over its logits, compiled: the same definition as the tensor code, bit for bit.

`stages`, `numerics` and `noise` say what is computed; this says it again as loops, for a row of 152k scores stays in
a core's cache between loops and leaves it between tensor operations. Tests hold the two together. No fast-math: it
would let the compiler change the bits. Needs Numba; without it `sampling` uses the tensor code alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from myserve.core.compiled.nucleus import SPARE_ROWS, best_scores, truncate
from myserve.core.compiled.row_reductions import (
    block_maxima,
    drop_masked,
    first_index,
    largest_score,
    only_masks,
    scale,
    weigh,
    weigh_few,
    weigh_only,
    widen,
)
from myserve.core.compiled.scalar_math import (
    BLOCK,
    INFINITY,
    MASS_ONE,
    ZERO,
    compiled,
    neg_log1m,
    philox,
    uniform,
)

__all__ = ["WORK_ROWS", "best_rows", "draw_rows", "mask_rows", "normalise_rows", "race"]

WORK_ROWS = 3 + SPARE_ROWS  # of memory that a thread needs for a draw: fresh memory costs more than the draw


@compiled
def mask_rows(start: int, stop: int, masks: Any, scores: Any, rows: Any) -> None:
    """Mask rows as `stages.mask_` does: a word of the mask at a time, for most are all ones or all zeros."""
    V = scores.shape[1]
    for m in range(start, stop):
        row = scores[rows[m]]
        for w in range(masks.shape[1]):
            word = masks[m, w]
            if word == -1:
                continue
            first, last = 32 * w, min(32 * w + 32, V)
            if word == 0:
                row[first:last] = -INFINITY
            else:
                for i in range(first, last):
                    if not (word >> (i - first)) & 1:
                        row[i] = -INFINITY


@compiled
def race(weights: Any, key: Any) -> Any:
    """Draw a token as `noise.draw_counter` does: the first arrival; the most promising block sets the time to beat."""
    V = len(weights)
    heaviest = block_maxima(weights)
    alive, count = np.empty(len(heaviest), np.int64), 0
    for b in range(len(heaviest)):
        alive[count] = b
        count += heaviest[b] > ZERO
    w0, w1, w2 = np.empty(count, np.uint64), np.empty(count, np.uint64), np.empty(count, np.uint64)
    k0, k1, position, index = key[0], key[1], key[2], key[3]
    for at in range(count):
        w0[at], w1[at], w2[at] = philox(np.uint64(alive[at]), position, index, np.uint64(0), k0, k1)
    # v <= -log(1 - v): a bound without a logarithm; the factor outweighs its rounding
    bound = np.empty(count, np.float64)
    first = 0
    for at in range(count):
        bound[at] = uniform(w0[at], w1[at]) * (1 - 1e-12) / BLOCK / np.float64(heaviest[alive[at]])
        if bound[at] < bound[first]:
            first = at
    best, winner = math.inf, V
    for turn in range(-1, count):
        at = first if turn < 0 else turn
        if bound[at] > best:
            continue
        b = alive[at]
        least = neg_log1m(uniform(w0[at], w1[at])) / BLOCK
        lane = np.int64(w2[at] % np.uint64(BLOCK))
        for i in range(b * BLOCK, min((b + 1) * BLOCK, V)):
            weight = np.float64(weights[i])
            if weight == 0.0 or least / weight > best:
                continue
            e = least
            if i % BLOCK != lane:
                u0, u1, _ = philox(np.uint64(i), position, index, np.uint64(1), k0, k1)
                e = least + neg_log1m(uniform(u0, u1))
            if e / weight < best or (e / weight == best and i < winner):
                best, winner = e / weight, i
    return winner


@compiled
def normalise_rows(start: int, stop: int, scores: Any, largest: Any, masses: Any, work: Any) -> None:
    """Fill in the largest score and the mass of rows `start` to `stop`."""
    weights = work[0]
    for b in range(start, stop):
        largest[b] = largest_score(scores[b])
        masses[b] = weigh(scores[b], largest[b], weights)


@compiled
def best_rows(start: int, stop: int, scores: Any, wanted: Any, ids: Any, values: Any, work: Any) -> None:
    """Find the `wanted[b]` best tokens of each row, by id, those above the edge first; -1 where there is none."""
    for b in range(start, stop):
        row, maxima, k = scores[b], block_maxima(scores[b]), min(wanted[b], scores.shape[1])
        if not abs(largest_score(maxima)) < INFINITY:
            continue  # NaN has no order
        edge = best_scores(row, maxima, k, work[0])[k - 1]
        count = 0
        for at_edge in range(2):
            for block in range(len(maxima)):
                if maxima[block] < edge:
                    continue
                for i in range(block * BLOCK, min((block + 1) * BLOCK, len(row))):
                    chosen = row[i] == edge if at_edge else row[i] > edge
                    if chosen and count < k and row[i] > -INFINITY:
                        ids[b, count], values[b, count] = i, row[i]
                        count += 1


@compiled
def draw_rows(
    start: int, stop: int, places: Any, halves: Any, raw: Any, edited: Any, numbers: Any, top_k: Any, keys: Any,
    tokens: Any, floats: Any, masses: Any, work: Any,
) -> None:  # fmt: skip
    """Draw rows `start` to `stop`; `fast_path.draw` owns the arrays; `work` is [WORK_ROWS, V].

    The scores of row b are at places[b] of float32 `raw` and `edited`, or of `halves`, the bits of bfloat16 that
    nothing has edited.
    """
    for b in range(start, stop):
        place = places[b]
        if len(halves) > 0:
            widen(halves[place], work[0])
            own, own_edited = work[0], work[0]
        else:
            own, own_edited = raw[place], edited[place]
        tokens[b] = _draw_row(own, own_edited, numbers[b], top_k[b], keys[b], floats[b], masses[b], work[1:])


@compiled
def _draw_row(
    raw: Any, edited: Any, numbers: Any, top_k: Any, key: Any, floats: Any, masses: Any, work: Any
) -> Any:
    """Return the token of one row, -1 where there is none; fill in its numbers."""
    scaled, weights, spare = work[0], work[1], work[2:]
    temperature, top_p, min_p = numbers[0], numbers[1], numbers[2]
    raw_largest = largest_score(raw)
    changed = numbers[3] != 0.0  # whether stages 1 to 4 did anything
    largest = largest_score(edited) if changed else raw_largest
    floats[0], floats[1] = raw_largest, largest
    if not (abs(raw_largest) < INFINITY and abs(largest) < INFINITY):
        return -1
    if temperature == 0.0:
        token = first_index(edited, largest)
        masses[0], masses[1] = weigh_only(raw, raw_largest, weights), np.int64(MASS_ONE)
        floats[1], floats[2], floats[3] = ZERO, raw[token], ZERO
        return token
    scores = edited
    if temperature != 1.0:
        scale(edited, np.float32(temperature), largest, scaled)
        scores = scaled
        largest = largest_score(scaled)
        masses[0] = weigh_only(raw, raw_largest, weights)
        total = weigh(scores, largest, weights)
    else:
        masses[0] = weigh(raw, raw_largest, weights)
        if not changed:
            total = masses[0]
        elif largest == raw_largest and only_masks(raw, edited):
            total = drop_masked(edited, weights)
        else:
            total = weigh_few(scores, largest, weights)
    if top_k > 0 or top_p < 1.0 or min_p > 0.0:
        total = truncate(scores, weights, largest, total, top_k, top_p, min_p, spare)
    token = race(weights, key)
    if token >= len(scores):  # no token arrived: there was none to draw
        return -1
    floats[1], floats[2], floats[3], masses[1] = largest, raw[token], scores[token], total
    return token
