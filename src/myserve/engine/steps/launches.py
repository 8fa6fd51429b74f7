"""A recording is runs of kernel launches and tensor operations to be made again, without those that are dead.

It holds addresses, not tensors, in the memory that recordings share: so a step's later tensors take what earlier ones
left, when it is recorded and whenever it is replayed.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from myserve.engine.kernels.launch import Launch, enter
from myserve.engine.kernels.replay import replay_kernel

__all__ = [
    "Call",
    "Launches",
    "Memory",
    "Operation",
    "Taken",
    "TensorPlace",
    "parts",
    "storage",
    "without_dead_calls",
]


class Memory(Protocol):
    """Memory that recordings share: a tensor has its place there until nobody refers to it."""

    def copy_of(self, x: Tensor) -> Tensor:
        """Return a tensor of the values and strides of `x` that has a place there."""
        ...

    def has(self, address: int) -> bool:
        """Return whether a place begins at this address."""
        ...

    def places_of(self, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> set[int]:
        """Return the addresses of the places that some of these numbers point into."""
        ...


class TensorPlace:
    """Hold where a tensor lies in shared memory, without keeping it there."""

    __slots__ = ("address", "dtype", "num_bytes", "offset", "shape", "stride")

    def __init__(self, x: Tensor) -> None:
        self.address, self.num_bytes = storage(x), x.untyped_storage().nbytes()
        self.dtype, self.shape, self.stride, self.offset = x.dtype, x.shape, x.stride(), x.storage_offset()

    def tensor(self) -> Tensor:
        """Return a tensor there."""
        buffer = (ctypes.c_char * self.num_bytes).from_address(self.address)
        return torch.frombuffer(buffer, dtype=self.dtype).as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class Taken:
    """Mark that a tensor took the place at an address: what was written there before is read no more."""

    place: int


@dataclass(slots=True)
class Operation:
    """A tensor operation, whose fresh results are copied to where the recording had them."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[
        Any
    ]  # tensors or their places: those that are not views of what it was given; none where it works in place
    places: list[int]  # of these among what it returns

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Operation:
        given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        leaves = [] if func._schema.is_mutable else tree_leaves(out)
        fresh = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and storage(x) not in given]
        return cls(func, args, kwargs, [leaves[i] for i in fresh], fresh)

    @property
    def does_nothing(self) -> bool:
        """A view: it is there already."""
        return not self.results and not self.func._schema.is_mutable

    def move_into(self, memory: Memory, out: Any) -> Any:
        """Have the fresh results in shared memory, and return `out` with them there; hold nothing in it until `settle`.

        Tensors that are made here live on. Were they made while a step is recorded, they would lie between what its
        operations leave, and the C library could neither use that again nor give it back.
        """
        leaves, form = tree_flatten(out)
        for place in self.places:
            leaves[place] = memory.copy_of(leaves[place])
        self.results = [leaves[place] for place in self.places]
        self.args, self.kwargs, self.results = tree_map(
            lambda x: TensorPlace(x) if isinstance(x, Tensor) and memory.has(storage(x)) else x,
            (self.args, self.kwargs, self.results),
        )
        return tree_unflatten(leaves, form)

    def reads(self) -> set[int]:
        """Return the addresses of the places that it reads, or works in."""
        return {x.address for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, TensorPlace)}

    def writes(self) -> set[int]:
        """Return the addresses of the places of its fresh results."""
        return {x.address for x in self.results if isinstance(x, TensorPlace)}

    def settle(self) -> Operation:
        """Make the tensors that it works on; to be done once, before it is called."""
        self.args, self.kwargs, self.results = tree_map(
            lambda x: x.tensor() if isinstance(x, TensorPlace) else x, (self.args, self.kwargs, self.results)
        )
        return self

    def __call__(self) -> None:
        made = tree_leaves(self.func(*self.args, **self.kwargs))
        for place, result in zip(self.places, self.results, strict=True):
            result.copy_(made[place])


class Launches:
    """Kernel calls that follow each other, as one call."""

    def __init__(self, launches: list[Launch]) -> None:
        self._records = [
            ctypes.create_string_buffer(launch.record, len(launch.record)) for launch in launches
        ]
        threads = [launch.threads for launch in launches]
        waits = [max(pair) > 1 for pair in zip(threads, [*threads[1:], 1], strict=True)]
        rows = [
            (launch.kernel, ctypes.addressof(record), launch.threads, wait)
            for launch, record, wait in zip(launches, self._records, waits, strict=True)
        ]
        self._table = np.array(rows, np.int64)
        for record in self._records:
            ctypes.memset(record, 0, 16)  # the tickets
        self._threads = max(threads)
        self._kernel = replay_kernel()
        self._record = ctypes.create_string_buffer(self._kernel.size)
        self._kernel.fill(
            self._record,
            {
                "launches": self._table.ctypes.data,
                "count": len(self._table),
                "team_size": _address_of("omp_get_num_threads") if self._threads > 1 else 0,
                "give_way": _address_of("sched_yield"),
            },
        )
        self._address = ctypes.addressof(self._record)

    def __call__(self) -> None:
        ctypes.memset(self._address, 0, 16)
        enter(self._kernel.address, self._address, self._threads)


@functools.cache
def _address_of(name: str) -> int:
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


Call = Launch | Operation


def without_dead_calls(calls: list[Call | Taken], out: Tensor, memory: Memory) -> list[Call]:
    """Return the calls without operations whose results are never read: neither `out`, nor a later call that matters.

    A launch reads what lies at the numbers of its record; one that happens to look like an address keeps a call too
    many. Launches and what works in place always matter.
    """
    read = {storage(out)}
    kept: list[Call] = []
    for call in reversed(calls):
        if isinstance(call, Taken):
            read.discard(call.place)
            continue
        if isinstance(call, Launch):
            read |= memory.places_of(np.frombuffer(call.record, np.int64, len(call.record) // 8))
        else:
            if call.results and not call.writes() & read:
                continue
            read |= call.reads()
        kept.append(call)
    return kept[::-1]


def parts(calls: list[Call]) -> list[Launches | Operation]:
    """Return the calls with neighbouring launches joined into one."""
    made: list[Launches | Operation] = []
    pending: list[Launch] = []
    for call in calls:
        if isinstance(call, Launch):
            pending.append(call)
            continue
        if pending:
            made.append(Launches(pending))
        pending = []
        made.append(call.settle())
    return [*made, Launches(pending)] if pending else made
