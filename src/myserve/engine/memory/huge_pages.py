"""Memory that is streamed through from end to end, in huge pages: weights and the cache of keys and values. And what
was read through a file's mapping, given back.

Hardware fetches ahead within a page and no further: in pages of 4 KiB two cores read 19 GB/s here, of 2 MiB 27.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from myserve.engine.memory.prefault import HUGE_PAGE, Reserve

__all__ = ["FilePages", "touch", "zeros"]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, reserve: Reserve | None = None) -> Tensor:
    """Return zeros on the CPU, at a cache line at least; the system hands the pages out when they are first written.

    A large tensor is taken from `reserve`, whose pages are there already, as long as that has room.

    >>> zeros((2, 3), torch.bfloat16).sum()
    tensor(0., dtype=torch.bfloat16)
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE:
        memory = np.zeros(size + 64, np.uint8)
        start = -memory.ctypes.data % 64
    elif reserve is not None and (taken := reserve.take(size)) is not None:
        memory, start = np.frombuffer(taken, np.uint8), 0
    else:
        # Anonymous and private: shared memory gets no huge pages. The whole lives as long as a tensor looks at it.
        pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, np.uint8)
        start = -memory.ctypes.data % HUGE_PAGE
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


def touch(x: Tensor) -> None:
    """Write to every page of a contiguous tensor, which keeps its values: its memory is handed out now."""
    x.view(torch.uint8).flatten().numpy()[:: mmap.PAGESIZE] |= 0


class FilePages:
    """The files that are mapped into this process now and were not written to, whose pages it can do without.

    A checkpoint is read through such a mapping, and while any tensor of it is used, its embeddings say, all of it
    would count as ours beside what was made of it. The system keeps the file in its cache as long as it has room: the
    next start need not read it from the disk. Elsewhere than on Linux nothing is known, and nothing happens.
    """

    def __init__(self) -> None:
        self._mapped = list(_unwritten_files())

    def hold(self, x: Tensor) -> bool:
        """Return whether `x` lies in such a file."""
        start, end = x.data_ptr(), x.data_ptr() + x.nbytes
        return x.device.type == "cpu" and any(low <= start and end <= high for low, high in self._mapped)

    def let_go(self, x: Tensor) -> None:
        """Drop the pages that hold `x` alone from this process; reading `x` again reads the file again."""
        start, end = x.data_ptr(), x.data_ptr() + x.nbytes
        if not self.hold(x):
            return
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


# A mapping of a file (its inode is not 0), and how much of it was written to.
_FILE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9].*\n(?:[A-Z].*\n)*?Anonymous: +(\d+)", re.MULTILINE
)


def _unwritten_files() -> Iterator[tuple[int, int]]:
    """From where to where each is mapped. A page of a private mapping that was written to is nowhere else."""
    maps = Path("/proc/self/smaps")
    for start, end, written in _FILE.findall(maps.read_bytes() if maps.exists() else b""):
        if written == b"0":
            yield int(start, 16), int(end, 16)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
