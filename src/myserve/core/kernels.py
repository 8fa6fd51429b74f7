"""The draw of a CPU row in few passes over its logits, compiled: the same definition as the tensor code, bit for bit.

`stages`, `numerics` and `noise` say what is computed; this says it again as loops, for a row of 152k scores stays in
a core's cache between loops and leaves it between tensor operations. Tests hold the two together. No fast-math: it
would let the compiler change the bits. Needs Numba; without it `sampling` uses the tensor code alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from myserve.core.kernel_math import (
    BLOCK,
    INFINITY,
    INFINITY_BITS,
    LOWEST_KEY,
    MAGNITUDE,
    MASS_ONE,
    SIGN_SHIFT,
    ZERO,
    compiled,
    exp,
    neg_log1m,
    philox,
    uniform,
)

BUCKETS = 2048  # of distances below the largest score, BUCKETS_PER_UNIT to 1; the last one takes all the rest
BUCKETS_PER_UNIT, LAST_BUCKET = np.float32(64.0), np.float32(BUCKETS - 1)
FIRST_GUESS = 64  # scores to try a nucleus with, before the whole row is looked at


@compiled
def largest_score(scores: Any) -> Any:
    """The maximum; NaN if any score is NaN."""
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
def mask_rows(start: int, stop: int, masks: Any, scores: Any, rows: Any) -> None:
    """`stages.mask_`: a word of the mask at a time, for most are all ones or all zeros."""
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
def weigh(scores: Any, largest: Any, weights: Any) -> Any:
    """Fill `weights` with exp(score - largest); their mass in quanta."""
    for i in range(len(scores)):
        weights[i] = exp(scores[i] - largest)
    return mass_of(weights)  # in a loop of its own: mixed widths would spoil the vectors of the first


@compiled
def mass_of(weights: Any) -> Any:
    """The mass in quanta."""
    total = np.int64(0)
    for i in range(len(weights)):
        total += np.int64(weights[i] * MASS_ONE)
    return total


@compiled
def block_maxima(scores: Any) -> Any:
    """The largest score of each block."""
    blocks = (len(scores) + BLOCK - 1) // BLOCK
    all_bits = scores.view(np.int32)
    maxima = np.empty(blocks, np.int32)
    for b in range(blocks):
        top = LOWEST_KEY
        for i in range(b * BLOCK, min((b + 1) * BLOCK, len(scores))):
            key = np.int32(all_bits[i] ^ ((all_bits[i] >> SIGN_SHIFT) & MAGNITUDE))
            if key > top:
                top = key
        maxima[b] = top ^ ((top >> SIGN_SHIFT) & MAGNITUDE)
    return maxima.view(np.float32)


@compiled
def only_masks(raw: Any, edited: Any) -> Any:
    """Whether every edited score is the raw one, or -inf."""
    others = np.int32(0)
    for i in range(len(raw)):
        others += np.int32((edited[i] != raw[i]) & (edited[i] != -INFINITY))
    return others == 0


@compiled
def drop_masked(edited: Any, weights: Any) -> Any:
    """Set the weights of scores at -inf to 0; the mass that stays. Counted in quanta, it is what `weigh` would find."""
    for i in range(len(edited)):
        weights[i] = ZERO if edited[i] == -INFINITY else weights[i]
    return mass_of(weights)


@compiled
def weigh_few(scores: Any, largest: Any, weights: Any) -> Any:
    """`weigh` where whole blocks may be at -inf: they take no exponentials."""
    weights[:] = ZERO
    maxima = block_maxima(scores)
    for b in range(len(maxima)):
        if maxima[b] > -INFINITY:
            for i in range(b * BLOCK, min((b + 1) * BLOCK, len(scores))):
                weights[i] = exp(scores[i] - largest)
    return mass_of(weights)


@compiled
def scale(scores: Any, temperature: Any, largest: Any, out: Any) -> None:
    """`stages.apply_temperature`."""
    shift = ZERO if abs(largest / temperature) < INFINITY else largest
    for i in range(len(scores)):
        out[i] = (scores[i] - shift) / temperature


@compiled
def sort_best(values: Any, k: int) -> Any:
    """Bring the k largest to the front, descending, in place: a quicksort that leaves the rest as it falls."""
    # Hoare's, for it halves equal values too. (NumPy's own sort and partition take 10 s more to compile.)
    pending, waiting = np.empty((64, 2), np.int64), 0
    low, high = 0, len(values) - 1
    while True:
        while high - low > 16:
            pivot, i, j = values[(low + high) // 2], low - 1, high + 1
            while i < j:
                i, j = i + 1, j - 1
                while values[i] > pivot:
                    i += 1
                while values[j] < pivot:
                    j -= 1
                if i < j:
                    values[i], values[j] = values[j], values[i]
            left = (low, j)
            right = (j + 1, high) if j + 1 < k else (j + 1, j)  # past k: empty
            if left[1] - left[0] < right[1] - right[0]:
                left, right = right, left
            if right[1] > right[0]:  # the shorter first: a stack of 64 serves any length
                pending[waiting, 0], pending[waiting, 1] = left
                waiting += 1
                low, high = right
            else:
                low, high = left
        for i in range(low + 1, high + 1):
            value, j = values[i], i
            while j > low and values[j - 1] < value:
                values[j] = values[j - 1]
                j -= 1
            values[j] = value
        if waiting == 0:
            return values
        waiting -= 1
        low, high = pending[waiting, 0], pending[waiting, 1]


@compiled
def scores_from(scores: Any, maxima: Any, lowest: Any) -> Any:
    """The scores >= `lowest`, descending."""
    found = np.empty(len(scores), np.float32)
    count = 0
    for b in range(len(maxima)):
        if maxima[b] >= lowest:
            for i in range(b * BLOCK, min((b + 1) * BLOCK, len(scores))):
                if scores[i] >= lowest:
                    found[count] = scores[i]
                    count += 1
    return sort_best(found[:count], count)


@compiled
def best_scores(scores: Any, maxima: Any, k: int) -> Any:
    """At least the k largest scores, descending: k blocks have a maximum no less than the k-th maximum."""
    if k >= len(maxima):
        return sort_best(scores.copy(), len(scores))
    return scores_from(scores, maxima, sort_best(maxima.copy(), k)[k - 1])


@compiled
def nucleus_edge(ordered: Any, largest: Any, above: Any, needed: Any) -> Any:
    """(the nucleus' lowest score, how many of that score are in it), of descending scores below a mass `above`.

    The count is 0 if `ordered` ends before the mass needed is reached.
    """
    at = 0
    while at < len(ordered):
        edge = ordered[at]
        quantum = np.int64(exp(edge - largest) * MASS_ONE)
        ties = 1
        while at + ties < len(ordered) and ordered[at + ties] == edge:
            ties += 1
        if above + ties * quantum >= needed:
            return edge, -((above - needed) // quantum)
        above += ties * quantum
        at += ties
    return -INFINITY, np.int64(0)


@compiled
def bucket_of(score: Any, largest: Any) -> Any:
    """Which bucket a score falls into: a lower score never into an earlier one."""
    place = (largest - score) * BUCKETS_PER_UNIT
    return np.int32(min(LAST_BUCKET, place))


@compiled
def wide_nucleus_edge(scores: Any, weights: Any, largest: Any, needed: Any) -> Any:
    """`nucleus_edge` of a whole row, by sorting only the bucket that the edge falls into."""
    places = np.empty(len(scores), np.int32)
    for i in range(len(scores)):
        places[i] = bucket_of(scores[i], largest)
    masses = np.zeros(BUCKETS, np.int64)
    for i in range(len(scores)):
        masses[places[i]] += np.int64(weights[i] * MASS_ONE)
    bucket, above = 0, np.int64(0)
    while above + masses[bucket] < needed:
        above += masses[bucket]
        bucket += 1
    found = np.empty(len(scores), np.float32)
    count = 0
    for i in range(len(scores)):
        found[count] = scores[i]  # written always, kept if it belongs: no branch to mispredict
        count += places[i] == bucket
    return nucleus_edge(sort_best(found[:count], count), largest, above, needed)


@compiled
def truncate(scores: Any, weights: Any, largest: Any, total: Any, k: int, p: float, min_p: float) -> Any:
    """Stages 6 to 8: set the weights of removed tokens to 0; the mass that stays."""
    lowest, ties = -INFINITY, np.int64(len(scores))
    limited = 0 < k < len(scores)
    if limited or p < 1.0:
        maxima = block_maxima(scores)
        best = best_scores(scores, maxima, k if limited else FIRST_GUESS)
        if limited:
            lowest = best[k - 1]
            total, count = np.int64(0), 0
            while count < len(best) and best[count] >= lowest:
                total += np.int64(exp(best[count] - largest) * MASS_ONE)
                count += 1
            best = best[:count]
        if p < 1.0:
            needed = max(np.int64(math.ceil(p * np.float64(total))), np.int64(1))
            lowest, ties = nucleus_edge(best, largest, np.int64(0), needed)
            if ties == 0:
                lowest, ties = wide_nucleus_edge(scores, weights, largest, needed)
    least_weight = np.float64(min_p)
    at_edge = np.int64(0)
    for i in range(len(scores)):
        at_edge += scores[i] == lowest
        below = (scores[i] < lowest) | (np.float64(weights[i]) < least_weight)
        weights[i] = ZERO if below else weights[i]
    if at_edge > ties:
        for i in range(len(scores)):
            if scores[i] == lowest:
                ties -= 1
                weights[i] = weights[i] if ties >= 0 else ZERO
    return mass_of(weights)


@compiled
def race(weights: Any, key: Any) -> Any:
    """`noise.draw_counter` of one row: blocks in order of promise, the first to set the time to beat."""
    V = len(weights)
    blocks = (V + BLOCK - 1) // BLOCK
    w0, w1, w2 = np.empty(blocks, np.uint64), np.empty(blocks, np.uint64), np.empty(blocks, np.uint64)
    k0, k1, position, index = key[0], key[1], key[2], key[3]
    for b in range(blocks):
        w0[b], w1[b], w2[b] = philox(np.uint64(b), position, index, np.uint64(0), k0, k1)
    heaviest = block_maxima(weights)
    # v <= -log(1 - v): a bound without a logarithm; the factor outweighs its rounding
    bound = np.empty(blocks, np.float64)
    first = 0
    for b in range(blocks):
        bound[b] = uniform(w0[b], w1[b]) * (1 - 1e-12) / BLOCK / np.float64(heaviest[b])
        if bound[b] < bound[first]:
            first = b
    best, winner = math.inf, V
    for turn in range(-1, blocks):
        b = first if turn < 0 else turn
        if heaviest[b] == ZERO or bound[b] > best:
            continue
        least = neg_log1m(uniform(w0[b], w1[b])) / BLOCK
        lane = np.int64(w2[b] % np.uint64(BLOCK))
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
def normalise_rows(start: int, stop: int, scores: Any, largest: Any, masses: Any) -> None:
    """The largest score and the mass of rows `start` to `stop`."""
    weights = np.empty(scores.shape[1], np.float32)
    for b in range(start, stop):
        largest[b] = largest_score(scores[b])
        masses[b] = weigh(scores[b], largest[b], weights)


@compiled
def best_rows(start: int, stop: int, scores: Any, wanted: Any, ids: Any, values: Any) -> None:
    """The `wanted[b]` best tokens of each row, in order of id, those above the edge first; -1 where there is none."""
    for b in range(start, stop):
        row, maxima, k = scores[b], block_maxima(scores[b]), min(wanted[b], scores.shape[1])
        if not abs(largest_score(maxima)) < INFINITY:
            continue  # NaN has no order
        edge = best_scores(row, maxima, k)[k - 1]
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
    start: int, stop: int, raw: Any, edited: Any, numbers: Any, top_k: Any, keys: Any, tokens: Any, floats: Any,
    masses: Any,
) -> None:  # fmt: skip
    """Rows `start` to `stop`: see `draw` in `fast.py`, which owns the arrays."""
    V = raw.shape[1]
    scaled, weights = np.empty(V, np.float32), np.empty(V, np.float32)
    for b in range(start, stop):
        temperature, top_p, min_p = numbers[b, 0], numbers[b, 1], numbers[b, 2]
        raw_largest = largest_score(raw[b])
        changed = numbers[b, 3] != 0.0  # whether stages 1 to 4 did anything
        largest = largest_score(edited[b]) if changed else raw_largest
        floats[b, 0], floats[b, 1] = raw_largest, largest
        if not (abs(raw_largest) < INFINITY and abs(largest) < INFINITY):
            tokens[b] = -1
            continue
        if temperature == 0.0:
            token = 0
            while edited[b, token] != largest:
                token += 1
            masses[b, 0] = weigh(raw[b], raw_largest, weights)
            floats[b, 1], floats[b, 3], masses[b, 1] = ZERO, ZERO, np.int64(MASS_ONE)
        else:
            scores = edited[b]
            if temperature != 1.0:
                scale(edited[b], np.float32(temperature), largest, scaled)
                scores = scaled
                largest = largest_score(scaled)
            masses[b, 0] = weigh(raw[b], raw_largest, weights)
            if temperature != 1.0:
                total = weigh(scores, largest, weights)
            elif not changed:
                total = masses[b, 0]
            elif largest == raw_largest and only_masks(raw[b], edited[b]):
                total = drop_masked(edited[b], weights)
            else:
                total = weigh_few(scores, largest, weights)
            if top_k[b] > 0 or top_p < 1.0 or min_p > 0.0:
                total = truncate(scores, weights, largest, total, top_k[b], top_p, min_p)
            token = race(weights, keys[b])
            floats[b, 1], floats[b, 3], masses[b, 1] = largest, scores[token], total
        tokens[b] = token
        floats[b, 2] = raw[b, token]
