"""From Python into compiled loops and back: Numba's cache, torch's own threads, no GIL.

A kernel is a function of one record (addresses, strides in bytes, counts) that every thread of a team calls; the
threads share the work out by tickets. The team is the one that torch computes with, entered through OpenMP's
`GOMP_parallel`: a second pool of our own would fight it for the cores.

`python -m myserve.engine.native` compiles everything into Numba's cache, so that a server starts at once.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc, from_dtype, types

from myserve.core.fingerprint import fingerprint as source_fingerprint

Record = np.ndarray[Any, np.dtype[np.void]]
Kernel = Callable[[Any], None]

_REALS = {"scale", "softcap"}


def record_type(*names: str) -> np.dtype[np.void]:
    """A struct of int64, but for the few that are float32."""
    return np.dtype([(name, np.float32 if name in _REALS else np.int64) for name in names], align=True)


def filled(kind: np.dtype[np.void], **fields: float) -> Record:
    """One record; every field must be given.

    >>> filled(record_type("rows", "scale"), rows=3, scale=0.5)["rows"].item()
    3
    """
    record = np.zeros(1, kind)
    record[0] = tuple(fields.pop(name) for name in kind.names or ())
    assert not fields, f"the record has no {', '.join(fields)}"
    return record


def fingerprint() -> int:
    """Of the sources that this package's kernels are compiled from; every entry point holds it."""
    return source_fingerprint(Path(__file__).parent, "lanes.py", "tiles.py", "kernels.py", "gemm_kernels.py")


def compiled(record: np.dtype[np.void]) -> Callable[[Kernel], Any]:
    """Compiles a kernel of one `record`, or reads it from Numba's cache."""
    signature = types.void(types.CPointer(from_dtype(record)))

    def compile_(function: Kernel) -> Any:
        try:
            return cfunc(signature, cache=True)(function)
        except RuntimeError:  # there is no place on this machine that Numba may write its cache to
            return cfunc(signature)(function)

    return compile_


class Workspace(threading.local):
    """What the kernel calls of a thread reuse: a record, and scratch for the team that it enters.

    Between two calls the weights have swept the caches, so that every object that a call makes is a miss: a fresh
    record and fresh scratch cost 100 µs a call where they cost 20 in a loop.
    """

    def __init__(self) -> None:
        self._record = ctypes.create_string_buffer(8 * 32)
        self.address = ctypes.addressof(self._record)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def record(self, *fields: int) -> int:
        """Fill the record with int64 fields; its address."""
        struct.pack_into(f"{len(fields)}q", self._record, 0, *fields)
        return self.address

    def scratch(self, size: int) -> int:
        """The address of at least `size` bytes, at a cache line."""
        if self._scratch.numel() < size + 64:
            self._scratch = torch.empty(size + 64, dtype=torch.uint8)
        address = self._scratch.data_ptr()
        return address + -address % 64


_workspace = Workspace()


def this_thread() -> Workspace:
    return _workspace


def launch(kernel: Any, record: int, threads: int) -> None:
    """Runs `kernel` on the record at an address, on `threads` threads of torch's team, without the GIL.

    Its bits do not tell how many threads there were.
    """
    team = _team() if threads > 1 else None
    if team is None:
        _alone(kernel.address)(record)
    else:
        team(kernel.address, record, threads, 0)


_alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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
    """One thread below some tens of microseconds of work: waking a second costs more than it saves."""
    return torch.get_num_threads() if work > 1 << 17 else 1


def warm() -> None:
    """Compiles every kernel that this machine uses into Numba's cache (some seconds, once)."""
    from myserve.core import fast
    from myserve.engine.gemm_kernels import linear_kernel
    from myserve.engine.kernels import attend_kernel, store_kernel

    fast.warm_up()
    for dtype in (torch.bfloat16, torch.float32):
        attend_kernel(dtype), store_kernel(dtype), linear_kernel(dtype)


if __name__ == "__main__":
    warm()
