"""Top-k, top-p and min-p of a row, compiled: the kept tokens are found without sorting the vocabulary.

A nucleus of few tokens is found among the best blocks. A wide one, as of nearly flat logits, is looked for where a
sample of the row says that it ends, and only where the sample is wrong among all. What is found is exact either way.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from myserve.core.compiled.row_reductions import block_maxima, mass_of
from myserve.core.compiled.scalar_math import (
    BLOCK,
    INFINITY,
    MASS_ONE,
    ZERO,
    block_between,
    compiled,
    exp,
    lowest_bit,
)

__all__ = [
    "BUCKETS",
    "FIRST_GUESS",
    "MARGIN",
    "SAMPLED",
    "SPARE_ROWS",
    "best_scores",
    "edge_among",
    "guess_edge",
    "mass_from",
    "masses_of",
    "nucleus_edge",
    "place_scores",
    "scores_between",
    "scores_from",
    "sort_best",
    "truncate",
    "wide_nucleus_edge",
]

BUCKETS = 2048  # of distances below the largest score, BUCKETS_PER_UNIT to 1; the last one takes all the rest
BUCKETS_PER_UNIT, LAST_BUCKET = np.float32(64.0), np.float32(BUCKETS - 1)
FIRST_GUESS = 64  # scores to try a nucleus with, before the whole row is looked at
SAMPLED = 16  # a score of so many says where a wide nucleus may end
MARGIN = 0.08  # of the mass beyond it: some four times what a sample of flat logits is off by
SPARE_ROWS = 3  # of memory that `truncate` is given


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
def scores_from(scores: Any, maxima: Any, lowest: Any, found: Any) -> Any:
    """Return the scores >= `lowest`, descending, in `found`."""
    count = 0
    for b in range(len(maxima)):
        if maxima[b] >= lowest:
            for i in range(b * BLOCK, min((b + 1) * BLOCK, len(scores))):
                if scores[i] >= lowest:
                    found[count] = scores[i]
                    count += 1
    return sort_best(found[:count], count)


@compiled
def best_scores(scores: Any, maxima: Any, k: int, found: Any) -> Any:
    """Return at least the k largest scores, descending, in `found`: k blocks reach the k-th largest maximum."""
    if k >= len(maxima):
        found[:] = scores
        return sort_best(found, len(scores))
    return scores_from(scores, maxima, sort_best(maxima.copy(), k)[k - 1], found)


@compiled
def nucleus_edge(ordered: Any, largest: Any, above: Any, needed: Any) -> Any:
    """Return (the nucleus' lowest score, how many of that score are in it), of descending scores below a mass `above`.

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
def place_scores(scores: Any, top: Any, per_unit: Any, places: Any) -> None:
    """Fill `places` with each score's bucket below `top`: a lower score never falls into an earlier one."""
    for i in range(len(scores)):
        places[i] = np.int32(min(LAST_BUCKET, (top - scores[i]) * per_unit))


@compiled
def masses_of(places: Any, weights: Any) -> Any:
    """Return the mass of each bucket."""
    masses = np.zeros(BUCKETS, np.int64)
    for i in range(len(weights)):
        masses[places[i]] += np.int64(weights[i] * MASS_ONE)
    return masses


@compiled
def edge_among(
    scores: Any, weights: Any, top: Any, per_unit: Any, largest: Any, above: Any, needed: Any, places: Any, found: Any
) -> Any:  # fmt: skip
    """Return `nucleus_edge` of scores in any order, none above `top`, by sorting only the edge's bucket."""
    place_scores(scores, top, per_unit, places)
    masses = masses_of(places, weights)
    bucket = 0
    while above + masses[bucket] < needed:
        above += masses[bucket]
        bucket += 1
    count = 0
    for i in range(len(scores)):
        found[count] = scores[i]  # written always, kept if it belongs: no branch to mispredict
        count += places[i] == bucket
    return nucleus_edge(sort_best(found[:count], count), largest, above, needed)


@compiled
def guess_edge(scores: Any, weights: Any, largest: Any, beyond: Any) -> Any:
    """Estimate (low, high) around the edge below which a mass of `beyond` lies, by a sample of the row.

    By the mass below the edge, not above: no weight there is a large one, so few samples tell it well.
    """
    some, theirs = scores[::SAMPLED].copy(), weights[::SAMPLED].copy()
    places = np.empty(len(some), np.int32)
    place_scores(some, largest, BUCKETS_PER_UNIT, places)
    masses = masses_of(places, theirs)
    share = np.float64(beyond) / SAMPLED
    bucket, below = np.int64(BUCKETS - 1), np.float64(masses[BUCKETS - 1])
    while bucket > 0 and below < share * (1 - MARGIN):
        bucket -= 1
        below += masses[bucket]
    last = bucket
    while bucket > 0 and below < share * (1 + MARGIN):
        bucket -= 1
        below += masses[bucket]
    low = -INFINITY if last == BUCKETS - 1 else largest - np.float32(last + 1) / BUCKETS_PER_UNIT
    return np.float32(low), np.float32(largest - np.float32(bucket) / BUCKETS_PER_UNIT)


@compiled
def scores_between(scores: Any, weights: Any, low: Any, high: Any, found: Any, theirs: Any) -> Any:
    """Put the scores in [low, high) into `found` and their weights into `theirs`; return how many."""
    count, whole = 0, len(scores) // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        bits = block_between(scores, start, low, high)
        while bits != 0:
            i = start + lowest_bit(bits)
            found[count], theirs[count] = scores[i], weights[i]
            count += 1
            bits &= bits - np.uint64(1)
    for i in range(whole, len(scores)):
        if low <= scores[i] < high:
            found[count], theirs[count] = scores[i], weights[i]
            count += 1
    return count


@compiled
def mass_from(scores: Any, weights: Any, lowest: Any) -> Any:
    """Return the mass of the scores >= `lowest`."""
    total = np.int64(0)
    for i in range(len(scores)):
        total += np.int64(weights[i] * MASS_ONE) if scores[i] >= lowest else np.int64(0)
    return total


@compiled
def wide_nucleus_edge(scores: Any, weights: Any, largest: Any, total: Any, needed: Any, spare: Any) -> Any:
    """Return `nucleus_edge` of a whole row: among the few scores where a sample says it is, or else among all."""
    found, theirs, places = spare[0], spare[1], spare[2].view(np.int32)
    low, high = guess_edge(scores, weights, largest, total - needed)
    above = mass_from(scores, weights, high)
    if low > -INFINITY and low < high and above < needed:
        count = scores_between(scores, weights, low, high, found, theirs)
        if above + mass_of(theirs[:count]) >= needed:
            finer = LAST_BUCKET / (high - low)
            return edge_among(
                found[:count], theirs[:count], high, finer, largest, above, needed, places, found
            )
    return edge_among(scores, weights, largest, BUCKETS_PER_UNIT, largest, np.int64(0), needed, places, found)


@compiled
def truncate(
    scores: Any, weights: Any, largest: Any, total: Any, k: int, p: float, min_p: float, spare: Any
) -> Any:
    """Apply top-k, top-p and min-p: set removed tokens' weights to 0; return the mass that stays.

    `spare`: [SPARE_ROWS, V], memory to work in.
    """
    lowest, ties = -INFINITY, np.int64(len(scores))
    limited = 0 < k < len(scores)
    if limited or p < 1.0:
        maxima = block_maxima(scores)
        best = best_scores(scores, maxima, k if limited else FIRST_GUESS, spare[0])
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
                lowest, ties = wide_nucleus_edge(scores, weights, largest, total, needed, spare)
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
