"""Steps in which every request decodes one token, recorded by their number of requests and replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from myserve.engine.attention import PagedContext
from myserve.engine.kernels import BLOCK_SIZE
from myserve.engine.replay import NotRecordableError, Pool, Recording
from myserve.engine.scheduler import Piece

log = logging.getLogger(__name__)

MOST_REQUESTS = 64  # beyond, what Python adds to a step no longer shows

Forward = Callable[
    [Tensor, Tensor, Tensor, PagedContext], Tensor
]  # ids, positions, wanted rows, pages -> logits


@dataclass(slots=True)
class _Inputs:
    """What differs from step to step, in memory that stays where it is."""

    ids: Tensor  # [1, n]
    positions: Tensor  # [1, n]
    rows: Tensor  # [n]
    context: PagedContext

    @classmethod
    def of(cls, requests: int, layers: Sequence[tuple[Tensor, Tensor]], max_blocks: int) -> _Inputs:
        return cls(
            ids=torch.zeros(1, requests, dtype=torch.int64),
            positions=torch.zeros(1, requests, dtype=torch.int64),
            rows=torch.arange(requests),
            context=PagedContext(
                layers=layers,
                slot_mapping=torch.zeros(requests, dtype=torch.int64),
                block_tables=torch.zeros(requests, max_blocks, dtype=torch.int32),
                query_start=torch.arange(requests + 1, dtype=torch.int32),
                context_lens=torch.zeros(requests, dtype=torch.int32),
            ),
        )

    def fill(self, pieces: Sequence[Piece]) -> None:
        self.ids[0] = torch.tensor([p.request.token_ids[p.start] for p in pieces])
        at = torch.tensor([p.start for p in pieces])
        self.positions[0] = at
        self.context.context_lens[:] = at + 1
        slots = [
            p.request.block_table[p.start // BLOCK_SIZE] * BLOCK_SIZE + p.start % BLOCK_SIZE for p in pieces
        ]
        self.context.slot_mapping[:] = torch.tensor(slots)
        tables = self.context.block_tables.numpy()  # a view, and cheaper to assign to
        for table, piece in zip(tables, pieces, strict=True):
            table[: len(piece.request.block_table)] = piece.request.block_table


class DecodeSteps:
    """The recordings of one model. The first time that a number of requests decodes is recorded as it runs.

    The first recording is replayed and compared before any is believed: a model whose forward depends on its data
    in another way than through tensors shows it there, and goes on unrecorded.
    """

    def __init__(self, forward: Forward, layers: Sequence[tuple[Tensor, Tensor]], max_blocks: int) -> None:
        self._forward, self._layers, self._max_blocks = forward, layers, max_blocks
        self._pool = Pool()
        self._steps: dict[int, tuple[_Inputs, Recording]] = {}
        self._proved = False
        self.usable = True

    def take(self, pieces: Sequence[Piece]) -> bool:
        """Whether this step is one for `logits`."""
        return self.usable and len(pieces) <= MOST_REQUESTS and all(p.count == 1 for p in pieces)

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """[n, V], in memory that the next step writes again."""
        found = self._steps.get(len(pieces))
        if found is None:
            return self._record(pieces)
        inputs, recording = found
        inputs.fill(pieces)
        out = recording.replay()
        if not self._proved:
            self._proved = True
            own = self._run(inputs)
            if not torch.equal(own, out):
                self._give_up("a replayed step gave other logits")
            return own
        return out

    def clear(self) -> None:
        """Forget all recordings: what they read has moved."""
        self._steps.clear()

    def _record(self, pieces: Sequence[Piece]) -> Tensor:
        inputs = _Inputs.of(len(pieces), self._layers, self._max_blocks)
        inputs.fill(pieces)
        try:
            recording = Recording(lambda: self._run(inputs), self._pool)
        except NotRecordableError as reason:
            self._give_up(str(reason))
            return self._run(inputs)
        self._steps[len(pieces)] = inputs, recording
        return recording.out

    def _run(self, inputs: _Inputs) -> Tensor:
        return self._forward(inputs.ids, inputs.positions, inputs.rows, inputs.context)

    def _give_up(self, reason: str) -> None:
        self.usable = False
        self._steps.clear()
        log.info("decode steps run unrecorded: %s", reason)
