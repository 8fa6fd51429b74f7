"""Stages 5 to 9 for a batch: each stage runs on the rows that ask for it, and only those.

The result is the behaviour distribution as scores: its softmax is what the draw uses, and -inf is out of the
support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from myserve.core.params import SamplingParams
from myserve.core.stages import (
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_n_sigma,
    keep_top_p,
    keep_typical,
)
from myserve.core.transfer import upload

__all__ = ["scale", "truncate", "truncations"]

Rows = Sequence[SamplingParams]


def scale(edited: Tensor, params: Rows) -> Tensor:
    """Stage 5, [B, V]: z / T; at T = 0, 0 for the likeliest token (the lowest id among equals), else -inf."""
    scores = edited
    warm = [b for b, p in enumerate(params) if p.temperature not in (0.0, 1.0)]
    if warm:
        scores = _on_rows(scores, warm, apply_temperature, _column(params, warm, "temperature", scores))
    greedy = [b for b, p in enumerate(params) if p.temperature == 0.0]
    if greedy:
        scores = _on_rows(scores, greedy, _only_the_largest)
    return scores


def truncate(scaled: Tensor, params: Rows) -> Tensor:
    """Stages 6 to 9, [B, V]. At T = 0 there is nothing left to remove."""
    scores = scaled
    for _, left in truncations(scaled, params):
        scores = left
    return scores


def truncations(scaled: Tensor, params: Rows) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each stage of truncation that any row asks for, and the scores [B, V] that it leaves."""
    scores = scaled
    drawn = [b for b, p in enumerate(params) if p.temperature > 0]
    if rows := [b for b in drawn if (params[b].top_k or 0) > 0]:
        k, most = _column(params, rows, "top_k", scores, torch.int64), max(params[b].top_k or 0 for b in rows)
        scores = _on_rows(scores, rows, lambda some: keep_top_k(some, k, most))
        yield "top_k", scores
    if rows := [b for b in drawn if params[b].top_p < 1.0]:
        scores = _on_rows(scores, rows, keep_top_p, _column(params, rows, "top_p", scores))
        yield "top_p", scores
    if rows := [b for b in drawn if params[b].min_p > 0.0]:
        scores = _on_rows(scores, rows, keep_min_p, _column(params, rows, "min_p", scores))
        yield "min_p", scores
    if rows := [b for b in drawn if params[b].typical_p < 1.0]:
        scores = _on_rows(scores, rows, keep_typical, _column(params, rows, "typical_p", scores))
        yield "typical_p", scores
    if rows := [b for b in drawn if params[b].top_n_sigma is not None]:
        untruncated = scaled[upload(rows, torch.int64, scaled.device)]
        n = _column(params, rows, "top_n_sigma", scores)
        scores = _on_rows(scores, rows, lambda some: keep_top_n_sigma(some, untruncated, n))
        yield "top_n_sigma", scores


def _only_the_largest(scores: Tensor) -> Tensor:
    return torch.full_like(scores, -torch.inf).scatter(1, scores.argmax(-1, keepdim=True), 0.0)


def _column(
    params: Rows, rows: list[int], name: str, like: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """One parameter of the given rows, [R, 1]."""
    return upload([[getattr(params[b], name)] for b in rows], dtype, like.device)


def _on_rows(scores: Tensor, rows: list[int], stage: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """`scores` with a stage applied to some rows; never in place, for `scores` may be the raw logits."""
    if len(rows) == scores.shape[0]:
        return stage(scores, *args)
    at = upload(rows, torch.int64, scores.device)
    return scores.index_copy(0, at, stage(scores[at], *args))
