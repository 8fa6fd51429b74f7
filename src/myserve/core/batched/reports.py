"""The reports that rows ask for beside their token, in two halves: looked up where the scores are, written on the host.

Between the halves the caller moves `tensors`, together with whatever else it has to move.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from myserve.core.logprobs import (
    Kept,
    Normaliser,
    TopLogprobs,
    best_of,
    kept_sets,
    listed,
    support_of,
    top_logprobs,
)
from myserve.core.params import SamplingParams
from myserve.core.transfer import upload

__all__ = ["Reports"]

NamedLogprobs = tuple[tuple[int, float | None], ...]
Report = tuple[TopLogprobs, NamedLogprobs, Kept | None]


class Reports:
    """The reports of a batch: alternatives, named ids, the support."""

    def __init__(
        self, raw: Tensor, scaled: Tensor, behaviour: Tensor, params: Sequence[SamplingParams]
    ) -> None:
        """Scores [B, V] as the model gave them, after stage 5, and as they are drawn from."""
        self._params = params
        self.tensors: list[Tensor] = []
        self._best: list[tuple[str, list[int], slice]] = []  # of a mode, for these rows: where in `tensors`
        self._named: list[tuple[str, list[int], slice]] = []
        self._kept: tuple[list[int], slice] | None = None
        for mode, scores in (("raw", raw), ("processed", behaviour)):
            if asked := self._asking(mode, "top_logprobs"):
                best = best_of(_rows(scores, asked), [params[b].top_logprobs for b in asked])
                self._best.append((mode, asked, self._add(*best)))
            if asked := self._asking(mode, "logprob_token_ids"):
                self._named.append((mode, asked, self._add(self._scores_of_named(scores, asked))))
        if asked := [b for b, p in enumerate(params) if p.kept]:
            self._kept = asked, self._add(*support_of(_rows(scaled, asked), _rows(behaviour, asked)))

    def _asking(self, mode: str, what: str) -> list[int]:
        return [b for b, p in enumerate(self._params) if getattr(p, what) and p.logprobs_mode == mode]

    def _scores_of_named(self, scores: Tensor, asked: list[int]) -> Tensor:
        at = [b * scores.shape[1] + i for b in asked for i in self._params[b].logprob_token_ids]
        return scores.flatten()[upload(at, torch.int64, scores.device)]

    def _add(self, *tensors: Tensor) -> slice:
        self.tensors += tensors
        return slice(len(self.tensors) - len(tensors), len(self.tensors))

    def written(
        self, tensors: Sequence[Tensor], raw_norms: Sequence[Normaliser], norms: Sequence[Normaliser]
    ) -> list[Report]:
        """A row each, of the same `tensors` on the host."""
        norms_of = {"raw": raw_norms, "processed": norms}
        count = len(self._params)
        top: list[TopLogprobs] = [()] * count
        named: list[NamedLogprobs] = [()] * count
        kept: list[Kept | None] = [None] * count
        for mode, asked, place in self._best:
            ids, values = tensors[place]
            entries = listed(ids, values, [self._params[b].top_logprobs for b in asked])
            for b, best in zip(asked, entries, strict=True):
                top[b] = top_logprobs(best, norms_of[mode][b])
        for mode, asked, place in self._named:
            numbers = iter(tensors[place][0].tolist())
            for b in asked:
                norm, named_ids = norms_of[mode][b], self._params[b].logprob_token_ids
                named[b] = tuple((i, norm.maybe_logprob(next(numbers))) for i in named_ids)
        if self._kept is not None:
            asked, place = self._kept
            for b, support in zip(asked, kept_sets(*tensors[place]), strict=True):
                kept[b] = support
        return list(zip(top, named, kept, strict=True))


def _rows(scores: Tensor, places: list[int]) -> Tensor:
    # indexing copies a vocabulary a row: not when a part is the whole
    return scores if len(places) == len(scores) else scores[upload(places, torch.int64, scores.device)]
