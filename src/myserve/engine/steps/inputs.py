"""The inputs of one forward pass: the packed rows, where they lie in the cache, which of them are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from myserve.engine.batch_invariance.low_rank import AdapterRows
from myserve.engine.mixers.attention import PagedContext, Pages
from myserve.engine.mixers.recurrent import StateRows
from myserve.engine.scheduling.batch import ScheduledTokens

__all__ = ["Cache", "Layers", "Shape", "Staging", "StepInputs", "Take"]

Take = Callable[[int, torch.dtype], Tensor]  # (count, dtype) -> zeroed memory
Layers = Sequence[tuple[Tensor, Tensor]]  # (K, V) of each


class Cache(Protocol):
    """The cache as steps see it: `kv_cache.KVCache`."""

    @property
    def layers(self) -> Layers: ...
    @property
    def block_size(self) -> int: ...
    @property
    def pages(self) -> Pages | None: ...
    @property
    def states(self) -> Sequence[Tensor]: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Hold the sizes that a step has room for; it may fill less."""

    rows: int
    requests: int
    wanted: int


class Staging:
    """Write a step into pinned memory and send it to the device by one asynchronous copy."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._sent = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until the last copy is made: nothing else waits for a step without draws."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Start the copy, on the current stream."""
        self.device.copy_(self.host, non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self.device.device))


@dataclass(slots=True)
class StepInputs:
    """Hold the tensors that a forward pass reads; they may be filled anew for the next step."""

    ids: Tensor  # [1, rows] int64
    positions: Tensor  # [1, rows] int64
    wanted: Tensor  # [wanted] int64: the rows whose logits are asked for
    context: PagedContext
    block_size: int
    host: StepInputs | None = None  # for a device: the same inputs in pinned memory, where they are filled
    staging: Staging | None = None
    adapters: AdapterRows | None = None  # None: no row has one

    @classmethod
    def of(cls, shape: Shape, cache: Cache, max_blocks: int, *, with_adapters: bool = False) -> StepInputs:
        """Allocate inputs of a shape; `max_blocks`: the width of the block table."""
        if cache.pages is None:
            inputs = cls._made(_zeros, shape, cache, max_blocks)
            inputs.adapters = AdapterRows.of(shape.rows) if with_adapters else None
            return inputs
        longs, ints = 3 * shape.rows + shape.wanted, shape.requests * (max_blocks + 2) + 1
        staging = Staging(8 * longs + 4 * ints, cache.device)
        inputs = cls._made(_cutting(staging.device), shape, cache, max_blocks)
        host = cls._made(_cutting(staging.host), shape, cache, max_blocks)
        inputs.staging, inputs.host = staging, host
        inputs.context = replace(inputs.context, on_host=host.context)
        return inputs

    @classmethod
    def _made(cls, take: Take, shape: Shape, cache: Cache, max_blocks: int) -> StepInputs:
        """Allocate the tensors by `take`: int64 before int32, so that all are aligned when cut from one memory."""
        rows, requests = shape.rows, shape.requests
        ids, positions, slots = (take(rows, torch.int64) for _ in range(3))
        wanted = take(shape.wanted, torch.int64)
        tables = take(requests * max_blocks, torch.int32).view(requests, max_blocks)
        starts, lens = take(requests + 1, torch.int32), take(requests, torch.int32)
        context = PagedContext(cache.layers, slots, tables, starts, lens, cache.pages)
        if cache.states:
            places = take(requests, torch.int32), take(requests, torch.int32)
            context = replace(context, states=cache.states, state_rows=StateRows(starts, lens, *places))
        return cls(ids[None], positions[None], wanted, context, cache.block_size)

    @classmethod
    def unpadded(
        cls, scheduled: Sequence[ScheduledTokens], wanted: Sequence[int], cache: Cache, max_blocks: int
    ) -> StepInputs:
        """Return inputs sized for exactly this step, filled.

        On a GPU the block table keeps its full width, from which FlashAttention takes max_seqlen_k.
        """
        shape = Shape(sum(part.count for part in scheduled), len(scheduled), len(wanted))
        used = max(len(part.request.block_table) for part in scheduled)
        with_adapters = any(part.request.adapter is not None for part in scheduled)
        width = used if cache.pages is None else max_blocks
        inputs = cls.of(shape, cache, width, with_adapters=with_adapters)
        inputs.fill(scheduled, wanted)
        return inputs

    def cut(self, shape: Shape) -> StepInputs:
        """Return inputs of a smaller shape over the same memory."""
        context, host = self.context, None if self.host is None else self.host.cut(shape)
        starts, lens = context.query_start[: shape.requests + 1], context.context_lens[: shape.requests]
        states = context.state_rows
        if states is not None:
            places = states.read[: shape.requests], states.write[: shape.requests]
            states = StateRows(starts, lens, *places)
        return StepInputs(
            self.ids[:, : shape.rows],
            self.positions[:, : shape.rows],
            self.wanted[: shape.wanted],
            replace(
                context,
                slot_mapping=context.slot_mapping[: shape.rows],
                block_tables=context.block_tables[: shape.requests],
                query_start=starts,
                context_lens=lens,
                state_rows=states,
                on_host=None if host is None else host.context,
            ),
            self.block_size,
            host,
            self.staging,
            None if self.adapters is None else self.adapters.cut(shape.rows),
        )

    def fill(self, scheduled: Sequence[ScheduledTokens], wanted: Sequence[int]) -> None:
        """Pack the scheduled tokens; the room they leave becomes padding rows and requests without rows.

        `wanted`: the rows whose logits are asked for.
        """
        if self.host is None or self.staging is None:
            self._write(scheduled, wanted)
            return
        self.staging.wait()
        self.host._write(scheduled, wanted)
        self.staging.send()

    def _write(self, scheduled: Sequence[ScheduledTokens], wanted: Sequence[int]) -> None:
        """Fill by NumPy's views of the same memory, which are cheaper to assign to than tensors."""
        context = self.context
        tables = context.block_tables.numpy()  # [requests, max_blocks]
        starts = context.query_start.numpy()
        lens = context.context_lens.numpy()
        for number, part in enumerate(scheduled):
            table = part.request.block_table
            tables[number, : len(table)] = table
        counts = np.array([part.count for part in scheduled])
        ends = counts.cumsum()
        starts[1 : len(scheduled) + 1] = ends
        starts[len(scheduled) + 1 :] = ends[-1]
        first = np.array([part.start for part in scheduled])
        lens[: len(scheduled)] = first + counts
        lens[len(scheduled) :] = 0
        if context.state_rows is not None:
            _write_slots(context.state_rows, scheduled)
        size = self.block_size
        owner = np.repeat(np.arange(len(scheduled)), counts)  # [T]
        position = np.arange(ends[-1]) + (first - ends + counts)[owner]
        rows = int(ends[-1])
        for tensor, values, padding in (
            (
                self.ids[0],
                [token_id for part in scheduled for token_id in part.token_ids],
                0,
            ),
            (self.positions[0], position, 0),
            (
                context.slot_mapping,
                tables[owner, position // size].astype(np.int64) * size + position % size,
                -1,
            ),
        ):
            array = tensor.numpy()
            array[:rows] = values
            array[rows:] = padding
        picked = self.wanted.numpy()
        picked[: len(wanted)] = wanted
        picked[len(wanted) :] = 0  # row 0 once more: its logits are not read
        if self.adapters is not None:
            adapters = [part.request.adapter for part in scheduled]
            slots = np.array([-1 if adapter is None else adapter.slot for adapter in adapters])
            self.adapters.fill(slots[owner])


def _write_slots(rows: StateRows, scheduled: Sequence[ScheduledTokens]) -> None:
    """Write which slots the requests' states are read from and left in; requests without rows have none."""
    # a kernel would read in front of all slots, and the process would end without a word
    lost = sum(part.start > 0 and part.request.state_slot < 0 for part in scheduled)
    assert not lost, f"{lost} requests go on without the state of their contexts"
    for slots, name in ((rows.read, "state_slot"), (rows.write, "next_state_slot")):
        array = slots.numpy()
        array[: len(scheduled)] = [getattr(part.request, name) for part in scheduled]
        array[len(scheduled) :] = -1


def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(count, dtype=dtype)


def _cutting(memory: Tensor) -> Take:
    """Return an allocator that cuts tensors from `memory` [bytes] uint8, one behind the other."""
    start = 0

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal start
        start += count * dtype.itemsize
        return memory[start - count * dtype.itemsize : start].view(dtype)

    return take
