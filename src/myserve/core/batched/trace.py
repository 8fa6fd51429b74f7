"""Follows one row through the stages that its draw takes: the same functions, one at a time, and their results kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from myserve.core.batched.behaviour import scale, truncations
from myserve.core.batched.edits import EDITS
from myserve.core.logprobs import best_of, listed, ranks
from myserve.core.noise import BLOCK, TorchNoise, block_noise, token_noise
from myserve.core.numerics import quanta, weights_of
from myserve.core.rows import RowState
from myserve.core.stages import entropy_of
from myserve.core.transfer import upload
from myserve.core.waterfall import Draw, Stage, Waterfall, WaterfallToken

__all__ = ["trace"]

LISTED_REMOVED = 4  # of the tokens that a stage removed, so many of the likeliest are listed


def trace(raw: Tensor, row: RowState, top: int) -> Waterfall:
    """Return the waterfall of the row's next draw from `raw` [1, V], float32, finite, with something left to draw.

    `top`: how many tokens are listed of each distribution, and of the race.
    """
    steps = list(_steps(raw, row))
    race = _race(steps, row, max(2, top))
    ids = _listed_ids(steps, race, top)
    at = upload(ids, torch.int64, raw.device)  # [N]
    stages = [step.told(before, at) for before, step in zip([None, *steps], steps, strict=False)]
    by_rank = ranks(raw.expand(len(ids), -1), raw[0, at].unsqueeze(1), at.unsqueeze(1))
    columns = zip(*(step.column(at) for step in steps), strict=True)
    tokens = [
        _token(token_id, rank, steps, column, race)
        for token_id, rank, column in zip(ids, by_rank, columns, strict=True)
    ]
    tokens.sort(key=lambda token: token.rank)
    return Waterfall(tuple(stages), tuple(tokens), race.draw)


class _StageScores:
    """One stage's name, and the scores [1, V] that it left, as a distribution."""

    def __init__(self, name: str, scores: Tensor) -> None:
        self.name, self.scores = name, scores
        self.largest, self.weights = weights_of(scores)
        self.mass = quanta(self.weights)  # [1, V]
        self.total = int(self.mass.sum())
        self.left = scores > -torch.inf

    def column(self, at: Tensor) -> list[tuple[float, float]]:
        """Return (score, probability) of the tokens `at` [N]."""
        scores, shares = self.scores[0, at].tolist(), self.mass[0, at].tolist()
        return [(score, share / self.total) for score, share in zip(scores, shares, strict=True)]

    def told(self, before: _StageScores | None, listed_at: Tensor) -> Stage:
        """Return what the stage did; `listed_at` [N] are the tokens that are told one by one."""
        num_removed, lost = 0, 0.0
        if before is not None:
            removed = before.left & ~self.left
            num_removed, lost = int(removed.sum()), int(before.mass[removed].sum()) / before.total
        entropy = entropy_of(self.largest, self.scores, self.weights, self.mass.sum(-1, keepdim=True))
        num_tokens = int(self.left.sum())
        rest = self.total - int(self.mass[0, listed_at].sum())
        num_rest = num_tokens - int(self.left[0, listed_at].sum())
        return Stage(self.name, num_tokens, num_removed, lost, float(entropy), num_rest, rest / self.total)


def _steps(raw: Tensor, row: RowState) -> Iterator[_StageScores]:
    """Yield what each stage that acts on this row leaves, in order."""
    yield _StageScores("raw", raw)
    scores = raw
    for name, change in EDITS if row.edits_scores else ():
        changed = scores.clone()
        change(changed, [row])
        if not torch.equal(changed, scores):
            scores = changed
            yield _StageScores(name, scores)
    params = [row.params]
    scaled = scale(scores, params)
    if scaled is not scores:
        yield _StageScores("temperature", scaled)
    for name, left in truncations(scaled, params):
        yield _StageScores(name, left)


class _Arrivals(NamedTuple):
    draw: Draw
    first: list[int]  # the first to arrive, in order
    noise: dict[int, float]
    arrivals: dict[int, float]


def _race(steps: Sequence[_StageScores], row: RowState, count: int) -> _Arrivals:
    """Return the first `count` arrivals of the race, as the draw of the last step holds it."""
    if row.params.temperature == 0.0:
        return _argmax(steps)
    weights = steps[-1].weights[0]
    ids = weights.nonzero()[:, 0]  # [K], all that can arrive
    noise = _noise_of(ids, row)
    times = noise / weights[ids]
    order = times.topk(min(count, len(ids)), largest=False).indices
    first: list[int] = ids[order].tolist()
    arrivals = dict(zip(first, times[order].tolist(), strict=True))
    second = first[1] if len(first) > 1 else None
    margin = None if second is None else arrivals[second] / arrivals[first[0]]
    told = dict(zip(first, noise[order].tolist(), strict=True))
    return _Arrivals(Draw("race", first[0], second, margin), first, told, arrivals)


def _noise_of(ids: Tensor, row: RowState) -> Tensor:
    """Return the Exp(1) numbers of the row's next draw at these ids: float64, or float32 of torch noise."""
    if row.params.noise == "torch":
        source = TorchNoise(row.noise.seed, row.noise.sample_index, row.device)
        source.skip(row.num_completion_tokens, row.vocab_size)
        return source.exponentials(row.vocab_size)[ids]
    key = upload([row.counter_key], torch.int64, ids.device)  # [1, 4]
    least, lane = block_noise(ids // BLOCK, key)
    return token_noise(ids, key, least, lane)


def _argmax(steps: Sequence[_StageScores]) -> _Arrivals:
    """Return the choice at temperature 0: the likeliest of what the stages before it left, the lowest id of equals."""
    scores = steps[-2].scores
    (best,) = listed(*best_of(scores, [2]), [2])
    second = best[1] if len(best) > 1 else None
    gap = None if second is None else best[0][1] - second[1]
    draw = Draw("argmax", best[0][0], None if second is None else second[0], gap)
    return _Arrivals(draw, [token_id for token_id, _ in best], {}, {})


def _listed_ids(steps: Sequence[_StageScores], race: _Arrivals, top: int) -> list[int]:
    """Return the likeliest after each stage, the likeliest that each removed, and the first of the race."""
    ids = dict.fromkeys(race.first)
    for before, step in zip([None, *steps], steps, strict=False):
        (best,) = listed(*best_of(step.scores, [top]), [top])
        ids |= dict.fromkeys(token_id for token_id, _ in best)
        if before is not None:
            gone = before.scores.masked_fill(step.left, -torch.inf)
            (lost,) = listed(*best_of(gone, [LISTED_REMOVED]), [LISTED_REMOVED])
            ids |= dict.fromkeys(token_id for token_id, _ in lost)
    return list(ids)


def _token(
    token_id: int,
    rank: int,
    steps: Sequence[_StageScores],
    column: Sequence[tuple[float, float]],
    race: _Arrivals,
) -> WaterfallToken:
    is_left = [score > -torch.inf for score, _ in column]
    gone = is_left.index(False) if False in is_left else None
    return WaterfallToken(
        token_id,
        rank,
        tuple(score if left else None for (score, _), left in zip(column, is_left, strict=True)),
        tuple(share if left else None for (_, share), left in zip(column, is_left, strict=True)),
        None if gone is None else steps[gone].name,
        race.noise.get(token_id),
        race.arrivals.get(token_id),
    )
