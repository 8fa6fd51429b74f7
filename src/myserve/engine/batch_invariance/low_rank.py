"""Low-rank adapters (LoRA) of linear layers: y += scale * B(A(x)) for the rows of a pass that have one.

All adapters of a model share its layers: each layer has a table of their weights, and each pass says which row has
which. A row's sums are its own, as in every other product here, so that its bits are those that it has alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from myserve.engine.batch_invariance.linear import TILES, PackedWeight, pack_into
from myserve.engine.kernels.launch import this_thread, threads_for
from myserve.engine.kernels.lora.products import ENTRY, GROUP, lora_kernel, lora_scratch_bytes, padded_rank
from myserve.engine.memory import huge_pages

__all__ = ["AdapterMemory", "AdapterRows", "AdapterSlots", "LowRankLayer", "LowRankWeights", "packed_shapes"]

# The biases that no adapter has: more columns than a layer's. By NumPy: PyTorch would fill them with its threads, and a
# process that has started these can not be forked.
_ZEROS = torch.from_numpy(np.zeros(1 << 18, np.float32))


def packed_shapes(rank: int, inner: int, columns: int, dtype: torch.dtype) -> list[tuple[int, ...]]:
    """Return the shapes of a packed A [rank, inner] and B [columns, rank]."""
    inner, rank = PackedWeight.packed_inner(inner, dtype), padded_rank(rank, dtype)
    places = ((-(-rank // 16), inner), (-(-columns // 64) * 4, rank))
    if dtype == torch.bfloat16:
        return [(groups, terms // 2, 16, 2) for groups, terms in places]
    return [(groups, terms, 16) for groups, terms in places]


class AdapterMemory:
    """The memory of an adapter's weights: one block in huge pages, and what may be read behind the last of them."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> None:
        """`shapes`: of all that will be taken, by `packed_shapes`."""
        sizes = [math.prod(shape) for shape in shapes]
        # three groups of columns behind the last
        self._memory = huge_pages.zeros((sum(sizes) + 4 * max(sizes),), dtype)
        self._taken = 0

    @property
    def num_bytes(self) -> int:
        return self._memory.nbytes

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return the next part, of zeros; it begins at a cache line, as all shapes are whole ones."""
        first, self._taken = self._taken, self._taken + math.prod(shape)
        return self._memory[first : self._taken].view(shape)


@dataclass(frozen=True, slots=True)
class LowRankWeights:
    """One adapter's weights of one linear layer: A [r, K] and B [N, r], packed, and the scale of their product."""

    down: Tensor
    up: Tensor
    rank: int  # padded
    scale: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scale: float, memory: AdapterMemory | None = None) -> LowRankWeights:
        """Pack A [r, K] and B [N, r] of one dtype, bfloat16 or float32, into `memory`, or into memory of their own."""
        shapes = packed_shapes(len(a), a.shape[1], len(b), a.dtype)
        memory = AdapterMemory(shapes, a.dtype) if memory is None else memory
        down, up = (pack_into(w, memory.take(shape)) for w, shape in zip((a, b), shapes, strict=True))
        return cls(down, up, padded_rank(len(a), a.dtype), scale)


class AdapterRows:
    """The rows of a pass by their adapters: tensors that a recorded step reads anew each time it is replayed.

    >>> rows = AdapterRows.of(4)
    >>> rows.fill([-1, 1, 0, 1])
    >>> rows.order[:3].tolist(), rows.groups[:3].tolist()
    ([2, 1, 3], [[0, 0, 1], [1, 1, 3], [-1, 0, 0]])
    """

    def __init__(self, of_row: Tensor, order: Tensor, groups: Tensor) -> None:
        """Int64. `of_row` [rows]: slots; `order` [rows]: rows that have one, side by side; `groups` [rows + 1, 3]."""
        self.of_row, self.order, self.groups = of_row, order, groups

    @classmethod
    def of(cls, rows: int) -> AdapterRows:
        """Return the arrangement of `rows` rows without adapters."""
        made = cls(
            torch.full((rows,), -1),
            torch.zeros(rows, dtype=torch.int64),
            torch.zeros(rows + 1, len(GROUP), dtype=torch.int64),
        )
        made.fill(())
        return made

    def cut(self, rows: int) -> AdapterRows:
        """Return the arrangement of fewer rows in the same memory."""
        return AdapterRows(self.of_row[:rows], self.order[:rows], self.groups[: rows + 1])

    def fill(self, slots: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """Arrange rows by their adapters' slots, one a row; below 0 is none, as for the rows behind them."""
        of_row = np.asarray(slots, np.int64)
        self.of_row[len(of_row) :] = -1
        self.of_row.numpy()[: len(of_row)] = of_row
        order = np.argsort(of_row, kind="stable")
        order = order[np.count_nonzero(of_row < 0) :]
        used, first = np.unique(of_row[order], return_index=True)
        end = np.append(first, len(order))[1:]
        self.order.numpy()[: len(order)] = order
        groups = self.groups.numpy()
        groups[: len(used)] = np.stack([used, first, end], axis=1)
        groups[len(used)] = (-1, 0, 0)


class AdapterSlots:
    """Hold what the layers of one model share: how many adapters have a place, the rows of the pass that runs."""

    def __init__(self) -> None:
        self.count = 8
        self.rank = 32  # the highest that there is room for
        self.rows: AdapterRows | None = None  # None: no row of this pass has an adapter

    @contextmanager
    def passing(self, rows: AdapterRows | None) -> Iterator[None]:
        """Let a forward pass of these rows run inside; None: none of them has an adapter."""
        self.rows = rows
        try:
            yield
        finally:
            self.rows = None

    def make_room(self, slot: int, rank: int) -> bool:
        """Have room for an adapter; False where there was, True where all layers' memory must move."""
        count, highest = self.count, self.rank
        while self.count <= slot:
            self.count *= 2
        while self.rank < rank:
            self.rank *= 2
        return (count, highest) != (self.count, self.rank)


class LowRankLayer:
    """The adapters of one linear layer, or of all experts of a layer, by slot."""

    def __init__(
        self, slots: AdapterSlots, in_features: int, out_features: int, dtype: torch.dtype, experts: int = 1
    ) -> None:
        self._slots, self._dtype = slots, dtype
        self._out_features = out_features
        self._inner = PackedWeight.packed_inner(in_features, dtype)
        self._experts = experts
        self._weights: dict[int, Sequence[LowRankWeights]] = {}
        self._kernel = lora_kernel(dtype)
        self.resize()

    def resize(self) -> None:
        """Take the room that the slots say; a recorded step that knew this layer is void."""
        count = self._slots.count * self._experts
        self._table = torch.zeros(count, len(ENTRY), dtype=torch.int64)
        self._scales = torch.zeros(count, dtype=torch.float32)
        self._scratch_bytes, self._gathered = lora_scratch_bytes(
            max(self._inner, self._slots.rank), self._dtype.itemsize
        )
        for slot, weights in self._weights.items():
            self._write(slot, weights)

    def put(self, slot: int, weights: Sequence[LowRankWeights]) -> None:
        """Give a slot weights, of the layer or of each expert; between two passes."""
        self._weights[slot] = weights
        self._write(slot, weights)

    def drop(self, slot: int) -> None:
        """Empty a slot; between two passes."""
        if self._weights.pop(slot, None) is not None:
            self._table[slot * self._experts : (slot + 1) * self._experts] = 0

    def _write(self, slot: int, weights: Sequence[LowRankWeights]) -> None:
        for place, own in enumerate(weights, slot * self._experts):
            self._table[place] = torch.tensor([own.down.data_ptr(), own.up.data_ptr(), own.rank])
            self._scales[place] = own.scale

    def rows_of(self, tokens: Tensor, experts: Tensor) -> AdapterRows | None:
        """Return the arrangement of rows [R] that experts [R] take of the pass's tokens [R]; None: without adapters."""
        if self._slots.rows is None:
            return None
        slots = self._slots.rows.of_row[tokens]
        rows = AdapterRows.of(len(tokens))
        rows.fill(torch.where(slots < 0, -1, slots * self._experts + experts).numpy())
        return rows

    def add(self, x: Tensor, y: Tensor, rows: AdapterRows | None = None) -> Tensor:
        """Add the product of each row's adapter to y [..., N], in place, and return it; x [..., K].

        `rows`: their arrangement; None: the pass's.
        """
        rows = self._slots.rows if rows is None else rows
        if rows is None:
            return y
        x = x if x.dtype == self._dtype else x.to(self._dtype)
        if x.shape[-1] != self._inner:
            x = torch.nn.functional.pad(x, (0, self._inner - x.shape[-1]))
        x = x if x.is_contiguous() else x.contiguous()
        count, size = x.numel() // self._inner, self._dtype.itemsize
        made = torch.empty(count, self._slots.rank, dtype=self._dtype)  # [rows, r]: A(x), in `order`
        work = count * self._slots.rank
        self._launch(
            rows, work * self._inner // 4, is_up=0, x=x.data_ptr(), x_row=size * self._inner, out=made.data_ptr(),
            out_row=size * self._slots.rank,
        )  # fmt: skip
        self._launch(
            rows, work * self._out_features // 4, is_up=1, x=made.data_ptr(), x_row=size * self._slots.rank,
            out=y.data_ptr(), out_row=size * y.stride(-2),
        )  # fmt: skip
        return y

    def _launch(self, rows: AdapterRows, work: int, **places: int) -> None:
        threads = threads_for(work)
        self._kernel(
            threads, **places, inner=self._inner, columns=self._out_features, order=rows.order.data_ptr(),
            groups=rows.groups.data_ptr(), table=self._table.data_ptr(), scales=self._scales.data_ptr(),
            zeros=_ZEROS.data_ptr(), scratch=this_thread().scratch(threads * self._scratch_bytes),
            scratch_bytes=self._scratch_bytes, gathered=self._gathered, tiles=TILES.ctypes.data,
        )  # fmt: skip
