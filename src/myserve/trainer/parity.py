"""Compares the engine's logprobs with those of a trainer's forward pass, over the whole vocabulary.

The engine's logits are taken where it scores a prompt: the rows that its own logprobs are read from.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.runner.logit_rows import keep_rows
from myserve.errors import RequestError
from myserve.trainer.exact_forward import exact_forward

__all__ = ["QUANTILES", "ParityRow", "TrainerForward", "measure_parity"]

TrainerForward = Literal["float32", "bfloat16", "exact_forward"]
QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)
_ROWS = 64  # positions whose vocabulary is held at once
# Edges of the histogram that quantiles are read from: 1 % apart, from a float32's rounding up.
_EDGES = torch.logspace(-9, 2, 2547, dtype=torch.float64)


@dataclass(slots=True)
class ParityRow:
    """Hold how far one trainer's forward pass is from the engine. Differences are in nats."""

    forward: TrainerForward
    positions: int = 0
    vocabulary: int = 0
    equal_bits: bool = True  # all logits, as float32
    max_difference: float = 0.0  # of any token of the vocabulary, at any position
    max_text_difference: float = 0.0  # of the texts' own tokens: what a trainer's loss reads
    kl_mean: float = 0.0  # KL(engine || trainer) of a position
    kl_max: float = 0.0
    top1_flips: int = 0  # positions whose likeliest token is another
    kl: list[float] = field(default_factory=list)  # of each position
    _counts: Tensor = field(default_factory=lambda: torch.zeros(len(_EDGES) + 1, dtype=torch.int64))

    def add(self, engine: Tensor, trainer: Tensor, targets: Sequence[int]) -> None:
        """Add the logits of some positions, [N, V] each; `targets`: the tokens behind the first of them."""
        engine, trainer = engine.float(), trainer.float()
        self.equal_bits &= torch.equal(engine, trainer)
        ours, theirs = (logits.double().log_softmax(-1) for logits in (engine, trainer))
        gaps = (ours - theirs).abs()
        self._counts += torch.bincount(torch.bucketize(gaps.flatten(), _EDGES), minlength=len(_EDGES) + 1)
        self.max_difference = max(self.max_difference, gaps.max().item())
        if targets:
            own = gaps[range(len(targets)), list(targets)]
            self.max_text_difference = max(self.max_text_difference, own.max().item())
        # a sum of rounded terms may come out below 0
        kl = (ours.exp() * (ours - theirs)).sum(-1).clamp_min(0.0)
        self.kl += kl.tolist()
        self.positions, self.vocabulary = self.positions + len(ours), ours.shape[-1]
        self.kl_mean, self.kl_max = sum(self.kl) / len(self.kl), max(self.kl)
        self.top1_flips += int((engine.argmax(-1) != trainer.argmax(-1)).sum())

    def quantile(self, q: float) -> float:
        """Return the difference that this share of all (position, token) pairs does not exceed, to within 1 %."""
        place = int(torch.searchsorted(self._counts.cumsum(0), q * self._counts.sum()))
        if place == 0:
            return min(self.max_difference, float(_EDGES[0])) if self.max_difference else 0.0
        return min(self.max_difference, float(_EDGES[min(place, len(_EDGES) - 1)]))

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        names = [name for name in self.__slots__ if name not in ("_counts", "kl")]
        return {name: getattr(self, name) for name in names} | {
            "quantiles": {str(q): self.quantile(q) for q in QUANTILES}
        }


def measure_parity(
    model: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    forwards: Sequence[TrainerForward] = get_args(TrainerForward),
    config: EngineConfig | None = None,
    most_tokens: int = 512,
) -> list[ParityRow]:
    """Return a row for each of the trainer's forward passes, over all texts.

    `model`: a folder or a hub id. A text longer than `most_tokens`, or than the engine's context, is cut into pieces.
    Raises RequestError where no text has two tokens, UnsupportedModelError for what the engine cannot load.
    """
    model = os.fspath(model)
    engine = Engine.from_pretrained(model, config)
    try:
        length = min(most_tokens, engine.max_model_len)
        pieces = list(_pieces(engine, texts, length))
        if not pieces:
            raise RequestError("the texts have no two tokens: there is nothing to compare")
        logits = [_engine_logits(engine, ids) for ids in pieces]
        dtype = engine.runner.model.dtype
        limit = engine.max_model_len
    finally:
        engine.shutdown()
    return [_row(model, forward, dtype, limit, pieces, logits) for forward in forwards]


def _pieces(engine: Engine, texts: Sequence[str], length: int) -> Iterator[list[int]]:
    if engine.tokenizer is None:
        raise RequestError("the model has no tokenizer: its texts cannot be read")
    for text in texts:
        ids = list(engine.tokenizer(text)["input_ids"])
        for start in range(0, len(ids), length):
            if len(piece := ids[start : start + length]) > 1:
                yield piece


def _engine_logits(engine: Engine, ids: Sequence[int]) -> Tensor:
    """Return the engine's logits of every position, [T, V], taken as it scores the ids."""
    runner = engine.runner

    async def score() -> None:
        async for delta in engine.submit(ids, SamplingParams(max_tokens=0, prompt_logprobs=0)):
            if delta.error is not None:
                raise delta.error

    fixed = runner.settings[0]
    with torch.inference_mode(), keep_rows(runner.model, runner.structure.body, fixed) as rows:
        asyncio.run(score())
        return rows[0 : len(ids)].clone()


def _row(
    model: str,
    forward: TrainerForward,
    engine_dtype: torch.dtype,
    max_model_len: int,
    pieces: Sequence[list[int]],
    logits: Sequence[Tensor],
) -> ParityRow:
    """Run one forward pass of the trainer's over all pieces, and compare."""
    dtype = engine_dtype if forward == "exact_forward" else getattr(torch, forward)
    trainer: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    trainer.eval()
    if forward == "exact_forward":
        trainer = exact_forward(trainer, max_model_len=max_model_len)
    row = ParityRow(forward)
    with torch.no_grad():
        for ids, ours in zip(pieces, logits, strict=True):
            theirs = trainer(torch.tensor([ids])).logits[0]
            for start in range(0, len(ids), _ROWS):
                stop = start + _ROWS
                row.add(ours[start:stop], theirs[start:stop], ids[start + 1 : stop + 1])
    return row
