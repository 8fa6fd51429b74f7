"""From logits to the behaviour distribution: one function a stage, in the order of `docs/sampling.md`.

Every function takes float32 scores [R, V], in which a removed token is -inf, and a parameter for each row.
None looks across rows, and masses are summed as integers, so that a row's result is its own. Tokens are
ordered by score, equal scores by id, the lower first. Each stage of truncation keeps at least one of the tokens that it
is given, whatever the stages before have removed: its edge is measured from what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from myserve.core.noise import BLOCK
from myserve.core.numerics import LN2, MASS_ONE, exp, neg_log1m, quanta, weights_of

__all__ = [
    "Edits",
    "add_bias_",
    "allow_only_",
    "apply_temperature",
    "entropy_of",
    "forbid_",
    "keep_min_p",
    "keep_top_k",
    "keep_top_n_sigma",
    "keep_top_p",
    "keep_typical",
    "kth_largest",
    "log_total",
    "mask_",
    "nucleus_edge",
    "nucleus_edge_without_sync",
    "ordered",
    "penalise_counts_",
    "penalise_repetition_",
]

SMALLEST_NORMAL = 2.0**-126
FIRST_NUCLEUS_GUESS = 256


class Edits(NamedTuple):
    """Changes of single scores of a [B, V] tensor: at row * V + id, each once, and a number for each."""

    at: Tensor  # int64 [N]
    value: Tensor  # float32 [N]


# -- stages 1 to 4: in place, for they touch few scores of many; the caller owns the copy --------------------


def allow_only_(scores: Tensor, at: Tensor, rows: Tensor) -> None:
    """Stage 1: -inf in `rows` (int64), but at the flat positions `at`."""
    flat = scores.view(-1)
    allowed = flat[at]
    scores.index_fill_(0, rows, -torch.inf)
    flat.index_copy_(0, at, allowed)


def mask_(scores: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Stage 1: -inf in `rows` (int64 [R]) where `masks` (int32 [R, ceil(V / 32)]) has no bit set."""
    bits = torch.arange(8, device=scores.device)
    allowed = (masks.view(torch.uint8).unsqueeze(2) >> bits) & 1  # [R, bytes, 8]
    scores[rows] = scores[rows].masked_fill(allowed.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)


def forbid_(scores: Tensor, at: Tensor) -> None:
    """Stage 1: -inf at the flat positions `at`."""
    scores.view(-1).index_fill_(0, at, -torch.inf)


def add_bias_(scores: Tensor, bias: Edits) -> None:
    """Stage 2: z + b."""
    scores.view(-1).index_add_(0, bias.at, bias.value)


def penalise_repetition_(scores: Tensor, penalty: Edits) -> None:
    """Stage 3: z / r where z > 0, else z * r, at the ids of prompt and completion."""
    flat = scores.view(-1)
    seen = flat[penalty.at]
    flat.index_copy_(0, penalty.at, torch.where(seen > 0, seen / penalty.value, seen * penalty.value))


def penalise_counts_(scores: Tensor, counts: Edits, frequency: Tensor, presence: Tensor) -> None:
    """Stage 4: z - f * count - p * [count > 0]; f and p float32 [N] beside the counts in the completion."""
    penalty = counts.value * frequency + (counts.value > 0) * presence
    scores.view(-1).index_add_(0, counts.at, -penalty)


# -- stage 5: temperature ------------------------------------------------------------------------------------


def apply_temperature(scores: Tensor, temperature: Tensor) -> Tensor:
    """z / T, T > 0 float64 [R, 1]; (z - max) / T, the same softmax, where a tiny T would overflow the max."""
    # a T below float32's normal numbers gives quotients of 0 or -inf, as the smallest normal one does
    t = temperature.clamp(min=SMALLEST_NORMAL).to(torch.float32)
    largest = scores.amax(-1, keepdim=True)
    shift = torch.where((largest / t).isfinite(), 0.0, largest)
    return (scores - shift) / t


# -- stages 6 to 9: truncation -------------------------------------------------------------------------------


def keep_top_k(scores: Tensor, k: Tensor, most: int | None = None) -> Tensor:
    """Every token whose score is at least the k-th largest; k int64 [R, 1] >= 1. Ties at the edge stay.

    `most`: the largest k, which the host knows; a device would have to be asked.
    """
    return scores.masked_fill(scores < kth_largest(scores, k, most), -torch.inf)


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """The smallest set of likeliest tokens with mass >= p, p float64 [R, 1] in [0, 1); at least one token.

    A token stays if and only if the mass before it, in order, is below p of the whole: what transformers
    computes upwards from the tail (cumulative mass <= 1 - p goes), with the tie at the edge settled.
    """
    edge, ties = (nucleus_edge if scores.device.type == "cpu" else nucleus_edge_without_sync)(scores, p)
    at_edge = scores == edge
    return scores.masked_fill((scores < edge) | (at_edge & (at_edge.cumsum(-1) > ties)), -torch.inf)


def _needed(mass: Tensor, p: Tensor) -> Tensor:
    """[R, 1]: p of the mass in whole quanta, so that comparisons with it are exact."""
    total = mass.sum(-1, keepdim=True)
    return (p * total.double()).ceil().to(torch.int64).clamp(min=1)


def nucleus_edge(scores: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """([R, 1] the lowest score in the nucleus, [R, 1] how many tokens of just that score are in it)."""
    R, V = scores.shape
    largest, weights = weights_of(scores)
    needed = _needed(quanta(weights), p)
    edge = torch.empty_like(largest)
    ties = torch.empty_like(needed)
    pending = torch.arange(R, device=scores.device)
    guess = min(FIRST_NUCLEUS_GUESS, V)
    while len(pending) > 0:
        # the guess grows to a sort of everything only for rows whose nucleus is that large
        values = scores[pending].topk(guess, sorted=True).values  # [P, guess]
        mass = quanta(exp(values - largest[pending]))
        reached = mass.cumsum(-1)
        index = (reached < needed[pending]).sum(-1, keepdim=True)
        found = (index < guess).squeeze(-1)
        rows = pending[found]
        at = index[found]
        edge[rows] = values[found].gather(1, at)
        above = (values[found] > edge[rows]).sum(-1, keepdim=True)  # tokens of a larger score
        mass_above = torch.where(above > 0, reached[found].gather(1, (above - 1).clamp(min=0)), 0)
        each = mass[found].gather(1, at)
        ties[rows] = -((mass_above - needed[rows]) // each)  # ceil((needed - above) / each)
        pending = pending[~found]
        guess = min(guess * 8, V)
    return edge, ties


def nucleus_edge_without_sync(scores: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `nucleus_edge` does without a sync with the host: 32 halvings of all float32 values.

    Each is a pass over the vocabulary, of which a GPU makes dozens while the host waits for one answer.
    """
    largest, weights = weights_of(scores)
    mass, order = quanta(weights), ordered(scores)
    needed = _needed(mass, p)
    edge = torch.full_like(needed, -(2**31))  # the largest value that the needed mass lies at or above
    for bit in range(31, -1, -1):
        higher = edge + (1 << bit)
        reached = mass.where(order >= higher, 0).sum(-1, keepdim=True)
        edge = torch.where(reached >= needed, higher, edge)
    mass_above = mass.where(order > edge, 0).sum(-1, keepdim=True)
    value = torch.where(edge < 0, edge ^ 0x7FFFFFFF, edge).to(torch.int32).view(torch.float32)
    each = quanta(exp(value - largest))
    return value, -((mass_above - needed) // each)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Tokens at least min_p times as likely as the likeliest; min_p float64 [R, 1] in [0, 1]."""
    _, weights = weights_of(scores)
    return scores.masked_fill(weights.double() < min_p, -torch.inf)


def keep_typical(scores: Tensor, mass: Tensor) -> Tensor:
    """Locally typical (Meister et al. 2023): the tokens whose surprise is nearest the entropy, up to `mass`.

    mass float64 [R, 1] in (0, 1). The crossing token stays, and what ties with it.
    """
    largest, weights = weights_of(scores)
    share = quanta(weights)
    total = share.sum(-1, keepdim=True)
    entropy = entropy_of(largest, scores, weights, total)
    surprise = log_total(total) + (largest.double() - scores.double())
    strangeness = (surprise - entropy).abs()  # +inf for what is already removed
    ordered, order = strangeness.sort(dim=-1, stable=True)
    reached = share.gather(1, order).cumsum(-1)
    needed = (mass * total.double()).ceil().to(torch.int64).clamp(min=1)
    last = ordered.gather(1, (reached < needed).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1))
    return scores.masked_fill(strangeness > last, -torch.inf)


def keep_top_n_sigma(scores: Tensor, untruncated: Tensor, n: Tensor) -> Tensor:
    """Keep tokens within n standard deviations of the largest score left (Tang et al. 2024); n float64 [R, 1] > 0.

    The deviation is the population's, over every token that no constraint forbids (`untruncated` [R, V]): it
    describes the model's noise floor, which no other filter should move. The distance is from the largest score that
    the stages before have left, so that it stays: `keep_typical` may have removed the likeliest token, and measured
    from that one nothing might be left.
    """
    depth = untruncated.amax(-1, keepdim=True).double() - untruncated.double()
    finite = depth.isfinite()
    count = finite.sum(-1, keepdim=True)
    # a running sum goes in order of id whatever the batch; `sum` and `std` do not
    mean = depth.where(finite, 0.0).cumsum(-1)[:, -1:] / count
    square = (depth - mean).where(finite, 0.0).square().cumsum(-1)[:, -1:] / count
    below = scores.amax(-1, keepdim=True).double() - scores.double()
    return scores.masked_fill(below > n * square.sqrt(), -torch.inf)


# -- shared --------------------------------------------------------------------------------------------------


def ordered(scores: Tensor) -> Tensor:
    """int64 numbers in the order of float32 scores, the same for equal ones; each fits 32 bits.

    >>> ordered(torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0])).tolist()
    [-2139095041, -1065353217, 0, 0, 1065353216]
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # -0 + 0 is 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def kth_largest(scores: Tensor, k: Tensor, most: int | None = None) -> Tensor:
    """[R, 1]: the k-th largest score of each row; k int64 [R, 1] >= 1, none above `most`; above V counts as V."""
    V = scores.shape[-1]
    k = k.clamp(max=V)
    most = V if most is None else min(most, V)
    blocks = V // BLOCK
    if most < blocks // 4:
        # the k largest lie in the k blocks of largest maxima, or in the ragged end: far fewer scores to
        # select from
        body = scores[:, : blocks * BLOCK].view(-1, blocks, BLOCK)
        best = body.amax(-1).topk(most).indices  # [R, most]
        body = body.gather(1, best.unsqueeze(2).expand(-1, -1, BLOCK)).flatten(1)
        scores = torch.cat((body, scores[:, blocks * BLOCK :]), dim=1)
    return scores.topk(most, sorted=True).values.gather(1, k - 1)


def log_total(total: Tensor) -> Tensor:
    """log(total / 2**44), float64, of masses in quanta."""
    mantissa, exponent = torch.frexp(total.double() / MASS_ONE)  # mantissa in [1/2, 1)
    return exponent.double() * LN2 - neg_log1m(1.0 - mantissa)


def entropy_of(largest: Tensor, scores: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Entropy in nats, float64 [R, 1], of softmax(scores): log(total) + sum(w * (max - z)) / total."""
    # w * (max - z) <= 1/e, and 0 where the weight is; -inf scores would make it NaN
    surprise = torch.where(weights > 0, weights * (largest - scores), 0.0)
    return log_total(total) + quanta(surprise).sum(-1, keepdim=True).double() / total.double()
