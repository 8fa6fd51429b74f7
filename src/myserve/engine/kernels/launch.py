"""From Python into compiled loops and back: Numba's cache, torch's own threads, no GIL.

A kernel is a function of one record (addresses, strides in bytes, counts) that every thread of a team calls; the
threads share the work out by tickets. The team is the one that torch computes with, entered through OpenMP's
`GOMP_parallel`: a second pool of our own would fight it for the cores.

`python -m myserve.engine.kernels.warm` compiles everything into Numba's cache, so that a server starts at once.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc, from_dtype, types

from myserve.core.compiled.fingerprint import fingerprint as source_fingerprint

__all__ = [
    "Kernel",
    "KernelScratch",
    "Launch",
    "Workspace",
    "enter",
    "fingerprint",
    "recording",
    "this_thread",
    "threads_for",
]

_TICKETS = ("next_thread", "next_item")  # what every record begins with; taken by `lanes`
_REALS = {"scale", "softcap", "eps", "offset"}
_RECORD_BYTES = 512


def fingerprint() -> int:
    """Return a checksum of the sources that this package's kernels are compiled from; every entry point holds it."""
    return source_fingerprint(Path(__file__).parent)


class Kernel:
    """A compiled function of one record, and how its fields lie there: int64, but for the few that are float32."""

    def __init__(self, fields: tuple[str, ...], function: Callable[[Any], None]) -> None:
        self.fields = fields
        codes = "".join("f" if name in _REALS else "q" for name in fields)
        self._layout = struct.Struct(codes)  # aligned as C aligns, which is how NumPy's record has it
        self.size = 8 * len(_TICKETS) + self._layout.size
        assert self.size <= _RECORD_BYTES
        self._function = _compiled(_record_type(fields), function)
        self.address: int = self._function.address

    def __call__(self, threads: int, **values: float) -> None:
        """Run on `threads` threads of torch's team, without the GIL; the result does not depend on their number."""
        workspace = this_thread()
        self.fill(workspace.record, values)
        if workspace.launches is not None:
            record = ctypes.string_at(workspace.record_address, self.size)
            workspace.launches.append(Launch(self.address, record, threads))
            if not workspace.runs:
                return
        enter(self.address, workspace.record_address, threads)

    def fill(self, record: Any, values: dict[str, float]) -> None:
        """Write fresh tickets and every field into a record."""
        assert len(values) == len(self.fields), set(values) ^ set(self.fields)
        struct.pack_into("2q", record, 0, 0, 0)
        self._layout.pack_into(record, 8 * len(_TICKETS), *[values[name] for name in self.fields])


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a kernel, to be made again: its entry, the bytes of its record, its threads."""

    kernel: int
    record: bytes
    threads: int


def _record_type(fields: tuple[str, ...]) -> np.dtype[np.void]:
    names = _TICKETS + fields
    return np.dtype([(name, np.float32 if name in _REALS else np.int64) for name in names], align=True)


def _compiled(record: np.dtype[np.void], function: Callable[[Any], None]) -> Any:
    """Compiled, or read from Numba's cache."""
    signature = types.void(types.CPointer(from_dtype(record)))
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # there is no place on this machine that Numba may write its cache to
        return cfunc(signature)(function)


class KernelScratch:
    """Memory that grows. What was outgrown stays, for a recorded launch may know its address."""

    def __init__(self) -> None:
        self._buffers: list[bytearray] = []
        self._size = self._address = 0

    def address(self, size: int) -> int:
        """Return the address of at least `size` bytes, at a cache line."""
        if self._size < size:
            self._size = max(size, 2 * self._size)
            self._buffers.append(bytearray(self._size + 64))
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffers[-1]))
            self._address = address + -address % 64
        return self._address


class Workspace(threading.local):
    """Keep what the kernel calls of a thread reuse: a record, and scratch for the team that it enters.

    Between two calls the weights have swept the caches, so that every object that a call makes is a miss: a fresh
    record and fresh scratch cost 100 µs a call where they cost 20 in a loop.
    """

    def __init__(self) -> None:
        self.record = ctypes.create_string_buffer(_RECORD_BYTES)
        self.record_address = ctypes.addressof(self.record)
        self.launches: list[Any] | None = None
        self.runs = True
        self.memory = KernelScratch()

    def scratch(self, size: int) -> int:
        """Return the address of at least `size` bytes, at a cache line."""
        return self.memory.address(size)


_workspace = Workspace()


def this_thread() -> Workspace:
    return _workspace


@contextmanager
def recording(scratch: KernelScratch, *, runs: bool = True) -> Iterator[list[Any]]:
    """Append every kernel call that this thread makes meanwhile to the list, in its order; without `runs` do no more.

    They use a scratch of their own: who replays them may be another thread, and this one may compute meanwhile, or end.
    """
    workspace, calls = this_thread(), list[Any]()
    own, workspace.memory, workspace.launches, workspace.runs = workspace.memory, scratch, calls, runs
    try:
        yield calls
    finally:
        workspace.memory, workspace.launches, workspace.runs = own, None, True


def enter(kernel: int, record: int, threads: int) -> None:
    """Have every thread of a team call the function at one address with the record at another."""
    team = _team() if threads > 1 else None
    if team is None:
        _alone(kernel)(record)
    else:
        team(kernel, record, threads, 0)


_alone = functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))


@functools.cache
def _team() -> Any:
    """OpenMP's entry in the library that torch has loaded; None where that is another (macOS, Windows)."""
    try:
        team = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    team.argtypes, team.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return team


def threads_for(work: int) -> int:
    """Return how many threads to use: one below some tens of microseconds of work, for waking another costs more."""
    return torch.get_num_threads() if work > 1 << 17 else 1
