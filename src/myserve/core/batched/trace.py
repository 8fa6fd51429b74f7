"""Follows one row through the stages that its draw takes: the same functions, one at a time, and their results kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from myserve.core.batched.behaviour import scale, truncations
from myserve.core.batched.edits import EDITS
from myserve.core.batched.race import first_arrivals, first_torch_arrivals
from myserve.core.logprobs import best_of, listed, ranks_in_row
from myserve.core.numerics import quanta, weights_of
from myserve.core.rows import RowState
from myserve.core.stages import entropy_of
from myserve.core.transfer import upload
from myserve.core.waterfall import Draw, Stage, Waterfall, WaterfallToken

__all__ = ["asked_waterfalls", "trace"]

LISTED_REMOVED = 4  # of the tokens that a stage removed, so many of the likeliest are listed


def asked_waterfalls(rows: Sequence[RowState]) -> dict[int, tuple[int, Tensor | None]]:
    """Return `top` and `torch_state` of each row whose next token's waterfall is asked for; before it is drawn."""
    return {
        b: (asked.top, None if row.torch_noise is None else row.torch_noise.generator.get_state())
        for b, row in enumerate(rows)
        if (asked := row.params.waterfall) is not None and asked.at == row.num_completion_tokens
    }


def trace(raw: Tensor, row: RowState, top: int, torch_state: Tensor | None = None) -> Waterfall:
    """Return the waterfall of the row's next draw from `raw` [1, V], float32, finite, with something left to draw.

    `top`: how many tokens are listed of each distribution, and of the race. `torch_state`: of the row's generator
    before the draw, where that has been made.
    """
    steps = list(_steps(raw, row))
    race = _race(steps, row, max(2, top), torch_state)
    ids = _listed_ids(steps, race, top)
    at = upload(ids, torch.int64, raw.device)  # [N]
    stages = [step.told(before, at) for before, step in zip([None, *steps], steps, strict=False)]
    by_rank = ranks_in_row(raw[0], at)
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
        left = (scores[0] > -torch.inf).nonzero()[:, 0]  # [K]
        self.num_tokens = len(left)
        # a removed token has weight 0 and adds nothing to any sum: few that are left are looked at alone
        self.left = None if 2 * len(left) > scores.shape[1] else left
        some = scores if self.left is None else scores[:, left]
        largest, weights = weights_of(some)
        mass = quanta(weights)
        total = mass.sum(-1, keepdim=True)
        self.entropy = float(entropy_of(largest, some, weights, total))
        self.total = int(total)
        self.weights, self.mass = self._spread(weights), self._spread(mass)  # [V]

    def _spread(self, values: Tensor) -> Tensor:
        """Return what is known of the tokens left [1, K], with 0 for all others."""
        if self.left is None:
            return values[0]
        return values.new_zeros(self.scores.shape[1]).index_copy_(0, self.left, values[0])

    def column(self, at: Tensor) -> list[tuple[float, float]]:
        """Return (score, probability) of the tokens `at` [N]."""
        scores, shares = self.scores[0, at].tolist(), self.mass[at].tolist()
        return [(score, share / self.total) for score, share in zip(scores, shares, strict=True)]

    def mass_in(self, step: _StageScores) -> int:
        """Return the mass of the tokens that a later step has left."""
        if step.left is not None:
            return int(self.mass[step.left].sum())
        return int(self.mass.where(step.scores[0] > -torch.inf, 0).sum())

    def told(self, before: _StageScores | None, listed_at: Tensor) -> Stage:
        """Return what the stage did; `listed_at` [N] are the tokens that are told one by one."""
        num_removed, lost = 0, 0.0
        if before is not None and (num_removed := before.num_tokens - self.num_tokens):
            lost = (before.total - before.mass_in(self)) / before.total
        rest = self.total - int(self.mass[listed_at].sum())
        num_rest = self.num_tokens - int((self.scores[0, listed_at] > -torch.inf).sum())
        return Stage(self.name, self.num_tokens, num_removed, lost, self.entropy, num_rest, rest / self.total)


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


def _race(steps: Sequence[_StageScores], row: RowState, count: int, torch_state: Tensor | None) -> _Arrivals:
    """Return the first `count` arrivals of the race, as the draw of the last step holds it."""
    if row.params.temperature == 0.0:
        return _argmax(steps)
    weights = steps[-1].weights
    if row.torch_noise is not None:
        state = row.torch_noise.generator.get_state() if torch_state is None else torch_state
        ids, noise, times = first_torch_arrivals(weights, state, count)
    else:
        key = upload([row.counter_key], torch.int64, weights.device)  # [1, 4]
        ids, noise, times = first_arrivals(weights, key, count)
    first: list[int] = ids.tolist()
    arrivals = dict(zip(first, times.tolist(), strict=True))
    second = first[1] if len(first) > 1 else None
    margin = None if second is None else arrivals[second] / arrivals[first[0]]
    told = dict(zip(first, noise.tolist(), strict=True))
    return _Arrivals(Draw("race", first[0], second, margin), first, told, arrivals)


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
        if before is not None and step.num_tokens < before.num_tokens:
            gone = before.scores.masked_fill(step.scores > -torch.inf, -torch.inf)
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
