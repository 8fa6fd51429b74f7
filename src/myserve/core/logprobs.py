"""Three numbers that are never mixed: the raw logprob, the behaviour logprob, and the draw's support.

Logprobs are float32 numbers: the score's distance from the row's largest, less the log of the row's mass (see
`numerics`: exact sums). Equal logits give equal bits whether a token was drawn, scored in a prompt or in a
trainer.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from myserve.core.compiled import fast_path
from myserve.core.numerics import log_mass, quanta, weights_of
from myserve.core.stages import entropy_of, ordered
from myserve.errors import NonFiniteLogitsError

__all__ = [
    "PROMPT_CHUNK",
    "Kept",
    "Normaliser",
    "Rows",
    "Scored",
    "TopLogprobs",
    "best_of",
    "kept_sets",
    "listed",
    "masses",
    "normalisers",
    "normalisers_of",
    "prompt_logprobs",
    "ranks",
    "ranks_in_row",
    "support_of",
    "to_float32",
    "top_logprobs",
]

LOWEST_FLOAT32 = -3.4028234663852886e38
PROMPT_CHUNK = 64  # rows of logits that exist at once while a prompt is scored

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """The support of a draw: ids, mass under softmax(z/T), and the entropy of softmax(z/T) in nats."""

    token_ids: tuple[int, ...]
    mass: float
    entropy: float


@dataclass(frozen=True, slots=True)
class Scored:
    """One prompt token's raw logprob given the tokens before it; None where its probability is 0."""

    token_id: int
    logprob: float | None
    top_logprobs: TopLogprobs = ()  # (id, logprob), best first
    rank: int | None = None  # among all ids, 1 the likeliest; of equals the lower id comes first
    token_id_logprobs: tuple[tuple[int, float | None], ...] = ()  # of the ids that were named


@dataclass(frozen=True, slots=True)
class Normaliser:
    """The numbers that turn a row's scores into logprobs: the largest score, and the log of the mass relative to it."""

    largest: float
    log_mass: float

    def logprob(self, score: float) -> float:
        """The logprob, rounded to float32, of a token with this finite score.

        >>> Normaliser(largest=2.0, log_mass=math.log(4)).logprob(2.0)
        -1.3862943649291992
        """
        return to_float32((score - self.largest) - self.log_mass)

    def maybe_logprob(self, score: float) -> float | None:
        """Return `logprob(score)`; None for a score of -inf, which has no finite logprob."""
        return self.logprob(score) if score > -math.inf else None


def to_float32(value: float) -> float:
    """Return the nearest float32, as a Python float."""
    # a distance between scores of 3e38 has no float32; the lowest one says as much
    return float(struct.unpack("f", struct.pack("f", max(value, LOWEST_FLOAT32)))[0])


def masses(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(largest score [R], mass in quanta [R]) of float32 scores [R, V] with a finite maximum in every row."""
    if fast_path.covers(scores):
        return fast_path.normalise(scores)
    largest, weights = weights_of(scores)
    return largest[:, 0], quanta(weights).sum(-1)


def normalisers_of(largest: Tensor, mass: Tensor) -> list[Normaliser]:
    """Return a Normaliser for each row of what `masses` gave, on the host."""
    pairs = zip(largest.tolist(), mass.tolist(), strict=True)
    return [Normaliser(top, log_mass(total)) for top, total in pairs]


def normalisers(scores: Tensor) -> list[Normaliser]:
    """Return a Normaliser for each row of float32 scores [R, V] that have a finite maximum."""
    return normalisers_of(*masses(scores))


def best_of(scores: Tensor, k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(ids, scores) [R, most] of each row's k[r] best at least, and perhaps of none or of -inf: see `listed`."""
    if fast_path.covers(scores):
        return fast_path.best_tokens(scores, k)
    most = min(max(k), scores.shape[1])
    # by score, equal scores by id, in one number, for which of equal scores topk gives is its own affair
    ids = torch.arange(scores.shape[1], device=scores.device)
    chosen = ((ordered(scores) << 32) - ids).topk(most).indices
    return chosen, scores.gather(1, chosen)


def listed(ids: Tensor, values: Tensor, k: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The k[r] best (id, score) of each row, best first, the lower id among equals; never one at -inf."""
    rows = zip(ids.tolist(), values.tolist(), k, strict=True)
    return [sorted(_there(*row[:2]), key=_best_first)[: row[2]] for row in rows]


def _there(ids: list[int], values: list[float]) -> list[tuple[int, float]]:
    pairs = zip(ids, values, strict=True)
    return [(token_id, value) for token_id, value in pairs if token_id >= 0 and value > -math.inf]


def _best_first(entry: tuple[int, float]) -> tuple[float, int]:
    return -entry[1], entry[0]


def top_logprobs(best: Sequence[tuple[int, float]], normaliser: Normaliser) -> TopLogprobs:
    """(id, logprob) of one row of `listed`."""
    return tuple((token_id, normaliser.logprob(score)) for token_id, score in best)


def support_of(scaled: Tensor, behaviour: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(bool [R, V], its mass and that of all tokens in quanta [R], the entropy [R]) of each row's support.

    The support is that of `behaviour`, measured under softmax(`scaled`); both [R, V].
    """
    largest, weights = weights_of(scaled)
    share = quanta(weights)
    total = share.sum(-1, keepdim=True)
    entropy = entropy_of(largest, scaled, weights, total)
    inside = behaviour > -torch.inf
    return inside, torch.where(inside, share, 0).sum(-1), total[:, 0], entropy[:, 0]


def kept_sets(inside: Tensor, mass: Tensor, total: Tensor, entropy: Tensor) -> list[Kept]:
    """Return each row's Kept from what `support_of` gave, on the host.

    >>> kept_sets(*support_of(torch.zeros(1, 4), torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])))
    [Kept(token_ids=(0, 2), mass=0.5, entropy=1.3862943611198904)]
    """
    rows = zip(inside, mass.tolist(), total.tolist(), entropy.tolist(), strict=True)
    return [Kept(tuple(row.nonzero()[:, 0].tolist()), part / whole, h) for row, part, whole, h in rows]


class Rows(Protocol):
    """Rows of logits, which may be made as they are looked at; a tensor [T, V] is one."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def prompt_logprobs(
    logits: Rows, target_ids: Sequence[int], k: int = 0, named_ids: Sequence[Sequence[int]] = ()
) -> list[Scored]:
    """The raw logprob of `target_ids[t]` under `logits[t]`, with the k best alternatives and those of named ids.

    `named_ids`: a row of ids for each target, equally long; or none.

    `logits` [T, V] of any float dtype, looked at `PROMPT_CHUNK` rows at a time: row t is the model's after
    the tokens before target t. Raises `NonFiniteLogitsError` naming the row if one holds NaN or +inf.

    >>> scored, = prompt_logprobs(torch.zeros(1, 4), [3], k=1, named_ids=[[2]])
    >>> scored.token_id, scored.logprob, scored.rank
    (3, -1.3862943649291992, 4)
    >>> scored.top_logprobs, scored.token_id_logprobs
    (((0, -1.3862943649291992),), ((2, -1.3862943649291992),))
    """
    scored: list[Scored] = []
    # [PROMPT_CHUNK, V]: a fresh 40 MB for each chunk costs as much as the head's product
    scores = torch.empty(0)
    for start in range(0, len(target_ids), PROMPT_CHUNK):
        targets = list(target_ids[start : start + PROMPT_CHUNK])
        chunk = logits[start : start + len(targets)].detach()
        if chunk.dtype != torch.float32:
            if not len(scores):
                scores = torch.empty_like(chunk, dtype=torch.float32)
            chunk = scores[: len(chunk)].copy_(chunk)
        _require_finite(chunk, start)
        ids = torch.tensor(targets, device=chunk.device).unsqueeze(1)  # [PROMPT_CHUNK, 1]
        own = chunk.gather(1, ids)
        values = own[:, 0].tolist()
        ks = [k] * len(targets)
        best = listed(*best_of(chunk, ks), ks) if k else [[]] * len(targets)
        names = named_ids[start : start + len(targets)] or [()] * len(targets)
        named = chunk.gather(1, torch.tensor(names, dtype=torch.int64, device=chunk.device))
        scored += [
            Scored(
                token_id,
                norm.maybe_logprob(value),
                top_logprobs(alternatives, norm),
                rank,
                tuple(
                    (i, norm.maybe_logprob(score)) for i, score in zip(ids_of_row, scores_of_row, strict=True)
                ),
            )
            for token_id, value, alternatives, norm, rank, ids_of_row, scores_of_row in zip(
                targets,
                values,
                best,
                normalisers(chunk),
                ranks(chunk, own, ids),
                names,
                named.tolist(),
                strict=True,
            )
        ]
    return scored


def ranks(scores: Tensor, own: Tensor, ids: Tensor) -> list[int]:
    """Return the rank of each row's own id, by (score, lower id first); `scores` [T, V], `own` and `ids` [T, 1]."""
    ranks: list[int] = ((scores > own).sum(-1) + 1).tolist()
    equals = (scores == own).sum(-1).tolist()
    for row, count in enumerate(equals):
        # rare, and a row's own: its rank is the same in any chunk
        if count > 1:
            ranks[row] += int((scores[row, : int(ids[row])] == own[row]).sum())
    return ranks


def ranks_in_row(scores: Tensor, ids: Tensor) -> list[int]:
    """Return the rank of each id of `ids` [N] among the scores [V] of one row, as `ranks`, but in two passes, not N."""
    own = scores[ids]  # [N]
    edges = own.sort().values  # [N], ascending
    # of the scores, bin e holds those in (edges[e - 1], edges[e]], and [edges[e - 1], edges[e])
    up_to, from_on = (torch.bucketize(scores, edges, right=right) for right in (False, True))
    bins = len(edges) + 1
    num_up_to = up_to.bincount(minlength=bins).cumsum(0)  # scores <= edges[e]
    num_below = from_on.bincount(minlength=bins).cumsum(0)  # scores < edges[e]
    place = torch.searchsorted(edges, own)
    ranks: list[int] = (len(scores) - num_up_to[place] + 1).tolist()
    equals = (num_up_to - num_below)[place].tolist()
    for n, (token_id, count) in enumerate(zip(ids.tolist(), equals, strict=True)):
        if count > 1:
            ranks[n] += int((scores[:token_id] == own[n]).sum())
    return ranks


def _require_finite(logits: Tensor, start: int) -> None:
    for row, largest in enumerate(logits.amax(-1).tolist(), start):
        if not math.isfinite(largest):
            raise NonFiniteLogitsError(
                f"the model's logits at prompt position {row} are not finite (max {largest})"
            )
