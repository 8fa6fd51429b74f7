"""Stages 1 to 4 for a batch: what the rows ask for as flat edits, one tensor a stage, none a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from myserve.core.compiled import fast_path
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.stages import (
    Edits,
    add_bias_,
    allow_only_,
    forbid_,
    mask_,
    penalise_counts_,
    penalise_repetition_,
)
from myserve.core.transfer import send, upload

__all__ = ["EDITS", "ScoreScratch", "edit"]

# Ids of one row's list, above which it is made a tensor once: in Python, 130,000 ids of 16 rows took 6 s at each step.
LONG = 256


class ScoreScratch:
    """Memory for one batch of scores, kept: a fresh 40 MB a step costs more in page faults than the copy itself."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def copy(self, scores: Tensor) -> Tensor:
        """`scores` as float32 in this memory, until the next copy."""
        size, memory = scores.numel(), self._memory
        if memory is None or memory.numel() < size or memory.device != scores.device:
            self._memory = memory = torch.empty(size, dtype=torch.float32, device=scores.device)
        return memory[:size].view(scores.shape).copy_(scores)


def edit(raw: Tensor, rows: Sequence[RowState], scratch: ScoreScratch) -> Tensor:
    """The scores [B, V] after stages 1 to 4: `raw` itself where no row asks for any, else a copy in `scratch`."""
    if not any(row.edits_scores for row in rows):
        return raw
    scores = scratch.copy(raw)
    for _, change in EDITS:
        change(scores, rows)
    return scores


def _constrain(scores: Tensor, rows: Sequence[RowState]) -> None:
    V, device = scores.shape[1], scores.device
    masked = [(b, mask) for b, row in enumerate(rows) if (mask := _mask(row)) is not None]
    if masked:
        apply = fast_path.mask_ if fast_path.covers(scores) else mask_
        masks = send(torch.stack([mask for _, mask in masked]), device)
        apply(scores, masks, upload([b for b, _ in masked], torch.int64, device))
    limited = [
        (b, row.params, allowed) for b, row in enumerate(rows) if (allowed := row.params.allowed_token_ids)
    ]
    few = [(b, params) for b, params, allowed in limited if len(allowed) <= LONG]
    if few:
        at = [b * V + token_id for b, params in few for token_id in _allowed(params)]
        places = [b for b, _ in few]
        allow_only_(scores, upload(at, torch.int64, device), upload(places, torch.int64, device))
    for b, params, allowed in limited:
        if len(allowed) > LONG:
            scores[b].masked_fill_(_forbidden_mask(params, V, device), -torch.inf)
    forbidden = [b * V + token_id for b, row in enumerate(rows) for token_id in row.forbidden_token_ids()]
    if forbidden:
        forbid_(scores, upload(forbidden, torch.int64, device))


def _mask(row: RowState) -> Tensor | None:
    return None if row.constraint is None else row.constraint.mask()


def _bias(scores: Tensor, rows: Sequence[RowState]) -> None:
    V, device = scores.shape[1], scores.device
    asked = [(b, row.params) for b, row in enumerate(rows) if row.params.logit_bias]
    biases = [
        (b * V + i, value)
        for b, params in asked
        if len(params.logit_bias) <= LONG
        for i, value in params.logit_bias.items()
    ]
    if biases:
        at, value = zip(*biases, strict=True)
        add_bias_(scores, Edits(upload(at, torch.int64, device), upload(value, torch.float32, device)))
    for b, params in asked:
        if len(params.logit_bias) > LONG:
            add_bias_(scores[b], _long_bias(params, device))


def _allowed(params: SamplingParams) -> frozenset[int]:
    return params.derived("allowed", lambda: frozenset(params.allowed_token_ids or ()))


def _forbidden_mask(params: SamplingParams, V: int, device: torch.device) -> Tensor:
    """Return bool [V]: True where `allowed_token_ids` has no id."""

    def make() -> Tensor:
        forbidden = torch.ones(V, dtype=torch.bool)
        forbidden[torch.tensor(params.allowed_token_ids, dtype=torch.int64)] = False
        return forbidden.to(device)

    return params.derived(("forbidden", V, device), make)


def _long_bias(params: SamplingParams, device: torch.device) -> Edits:
    """Return the changes of one row's scores."""

    def make() -> Edits:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        return Edits(
            ids.to(device), torch.tensor(list(params.logit_bias.values()), dtype=torch.float32).to(device)
        )

    return params.derived(("bias", device), make)


def _penalise(scores: Tensor, rows: Sequence[RowState]) -> None:
    V, device = scores.shape[1], scores.device
    penalised = [(b, row.params, row.history) for b, row in enumerate(rows) if row.history]
    if not penalised:
        return
    sizes = [len(history) for *_, history in penalised]
    lengths, total = upload(sizes, torch.int64, device), sum(sizes)
    first = upload([b * V for b, *_ in penalised], torch.int64, device)
    # told how long the result is, since a device would have to be asked
    first = first.repeat_interleave(lengths, output_size=total)
    at = torch.cat([history.ids() for *_, history in penalised]) + first
    counts = torch.cat([history.counts() for *_, history in penalised])

    def beside(values: list[float]) -> Tensor:
        return upload(values, torch.float32, device).repeat_interleave(lengths, output_size=total)

    repetition = [params.repetition_penalty for _, params, _ in penalised]
    if any(r != 1.0 for r in repetition):
        penalise_repetition_(scores, Edits(at, beside(repetition)))
    frequency = [params.frequency_penalty for _, params, _ in penalised]
    presence = [params.presence_penalty for _, params, _ in penalised]
    if any(frequency) or any(presence):
        penalise_counts_(scores, Edits(at, counts), beside(frequency), beside(presence))


# stages 1, 2, and 3 with 4, in their order: each changes scores [B, V] in place, as their rows ask
EDITS: tuple[tuple[str, Callable[[Tensor, Sequence[RowState]], None]], ...] = (
    ("constraints", _constrain),
    ("logit_bias", _bias),
    ("penalties", _penalise),
)
