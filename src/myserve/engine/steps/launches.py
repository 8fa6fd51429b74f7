"""A recording is runs of kernel launches and tensor operations to be made again, without those that are dead."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from myserve.engine.kernels.launch import Launch, enter
from myserve.engine.kernels.replay import replay_kernel

__all__ = ["Launches", "Operation", "parts", "storage", "without_dead_calls"]


@dataclass(slots=True)
class Operation:
    """A tensor operation, whose fresh results are copied to where the recording had them."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]  # those that are not views of what it was given; none where it works in place
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


def without_dead_calls(calls: list[Launch | Operation], out: Tensor) -> list[Launch | Operation]:
    """Return the calls without operations whose results are never read: neither `out`, nor a later call that matters.

    A launch reads what lies at the numbers of its record; one that happens to look like an address keeps a call too
    many. Launches and what works in place always matter.
    """
    read = {storage(out)}
    kept = []
    for call in reversed(calls):
        if isinstance(call, Launch):
            read.update(_numbers(call))
        else:
            if call.results and not any(_holds(result, read) for result in call.results):
                continue
            read.update(storage(x) for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor))
        kept.append(call)
    return kept[::-1]


def _numbers(launch: Launch) -> Iterator[int]:
    whole = len(launch.record) // 8
    yield from np.frombuffer(launch.record, np.int64, whole).tolist()


def _holds(result: Tensor, addresses: set[int]) -> bool:
    begin = storage(result)
    return any(begin <= address < begin + result.untyped_storage().nbytes() for address in addresses)


def parts(calls: list[Launch | Operation]) -> list[Launches | Operation]:
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
        made.append(call)
    return [*made, Launches(pending)] if pending else made
