"""What a forward pass is told of a step: the packed rows, where they lie in the cache, which of them are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from myserve.engine.attention import PagedContext
from myserve.engine.kernels import BLOCK_SIZE
from myserve.engine.scheduler import Piece

Layers = Sequence[tuple[Tensor, Tensor]]  # (K, V) of each


@dataclass(frozen=True, slots=True)
class Shape:
    """How much a step has room for; it may fill less."""

    rows: int
    requests: int
    wanted: int


@dataclass(slots=True)
class StepInputs:
    """Tensors that a forward pass reads, and that may be filled anew for the next."""

    ids: Tensor  # [1, rows] int64
    positions: Tensor  # [1, rows] int64
    wanted: Tensor  # [wanted] int64: the rows whose logits are asked for
    context: PagedContext

    @classmethod
    def of(cls, shape: Shape, layers: Layers, max_blocks: int) -> StepInputs:
        return cls(
            ids=torch.zeros(1, shape.rows, dtype=torch.int64),
            positions=torch.zeros(1, shape.rows, dtype=torch.int64),
            wanted=torch.zeros(shape.wanted, dtype=torch.int64),
            context=PagedContext(
                layers=layers,
                slot_mapping=torch.zeros(shape.rows, dtype=torch.int64),
                block_tables=torch.zeros(shape.requests, max_blocks, dtype=torch.int32),
                query_start=torch.zeros(shape.requests + 1, dtype=torch.int32),
                context_lens=torch.zeros(shape.requests, dtype=torch.int32),
            ),
        )

    @classmethod
    def exactly(
        cls, pieces: Sequence[Piece], wanted: Sequence[int], layers: Layers, device: torch.device
    ) -> StepInputs:
        """With no room left."""
        shape = Shape(sum(piece.count for piece in pieces), len(pieces), len(wanted))
        inputs = cls.of(shape, layers, max(len(piece.request.block_table) for piece in pieces))
        inputs.fill(pieces, wanted)
        return inputs if device.type == "cpu" else inputs.on(device)

    def cut(self, shape: Shape) -> StepInputs:
        """The same memory with room for less."""
        context = self.context
        return StepInputs(
            self.ids[:, : shape.rows],
            self.positions[:, : shape.rows],
            self.wanted[: shape.wanted],
            PagedContext(
                layers=context.layers,
                slot_mapping=context.slot_mapping[: shape.rows],
                block_tables=context.block_tables[: shape.requests],
                query_start=context.query_start[: shape.requests + 1],
                context_lens=context.context_lens[: shape.requests],
            ),
        )

    def on(self, device: torch.device) -> StepInputs:
        """A copy on another device."""
        context = self.context
        return StepInputs(
            self.ids.to(device),
            self.positions.to(device),
            self.wanted.to(device),
            PagedContext(
                layers=context.layers,
                slot_mapping=context.slot_mapping.to(device),
                block_tables=context.block_tables.to(device),
                query_start=context.query_start.to(device),
                context_lens=context.context_lens.to(device),
            ),
        )

    def fill(self, pieces: Sequence[Piece], wanted: Sequence[int]) -> None:
        """A step's pieces, packed; what room they leave becomes rows of nobody and requests without rows.

        By NumPy's views of the same memory, which are cheaper to assign to.
        """
        context = self.context
        tables = context.block_tables.numpy()  # [requests, max_blocks]
        starts = context.query_start.numpy()
        lens = context.context_lens.numpy()
        for number, piece in enumerate(pieces):
            table = piece.request.block_table
            tables[number, : len(table)] = table
        counts = np.array([piece.count for piece in pieces])
        ends = counts.cumsum()
        starts[1 : len(pieces) + 1] = ends
        starts[len(pieces) + 1 :] = ends[-1]
        first = np.array([piece.start for piece in pieces])
        lens[: len(pieces)] = first + counts
        lens[len(pieces) :] = 0
        owner = np.repeat(np.arange(len(pieces)), counts)  # [T]
        position = np.arange(ends[-1]) + (first - ends + counts)[owner]
        rows = int(ends[-1])
        for tensor, values, nobody in (
            (self.ids[0], [t for p in pieces for t in p.request.token_ids[p.start : p.start + p.count]], 0),
            (self.positions[0], position, 0),
            (
                context.slot_mapping,
                tables[owner, position // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + position % BLOCK_SIZE,
                -1,
            ),
        ):
            array = tensor.numpy()
            array[:rows] = values
            array[rows:] = nobody
        picked = self.wanted.numpy()
        picked[: len(wanted)] = wanted
        picked[len(wanted) :] = 0  # row 0 once more: nobody looks
