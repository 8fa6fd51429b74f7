"""Memory of tensors on the CPU, given back to the system while their addresses stay: dropped, or kept in a file.

What was recorded with an address stays right, so a step after the memory is back is the step that it was before.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import tempfile
from collections.abc import Iterable

from torch import Tensor

from myserve.errors import EngineError

__all__ = ["Spilled", "drop"]

WRITTEN_AT_ONCE = 64 << 20  # bytes


def drop(tensors: Iterable[Tensor]) -> None:
    """Give the pages of these tensors back; they read as zeros from then on, and pages come when they are written.

    >>> import torch
    >>> from myserve.engine.memory.huge_pages import zeros
    >>> x = zeros((1 << 20,), torch.float32).fill_(1)
    >>> drop([x]); float(x[5000])
    0.0
    """
    for start, end in _whole_pages(tensors):
        _give_back(start, end)


class Spilled:
    """The values of tensors in a temporary file (`TMPDIR` says where) while their memory is given back.

    >>> import torch
    >>> x = torch.arange(1 << 20)
    >>> spilled = Spilled([x, x.view(2, -1)])
    >>> int(x[9000]), spilled.restore(), int(x[9000])
    (0, None, 9000)
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._places = _whole_pages(tensors)
        self._file = tempfile.TemporaryFile(prefix="myserve-weights-")  # noqa: SIM115 - open until `restore`
        try:
            for start, end in self._places:
                for at in range(start, end, WRITTEN_AT_ONCE):
                    self._file.write(_bytes_at(at, min(end, at + WRITTEN_AT_ONCE)))
            self._file.flush()
        except OSError as error:
            self._file.close()
            raise EngineError(
                f"the weights could not be written to a temporary file: {error.strerror}"
            ) from error
        # all of it is in the file before the first page goes
        for start, end in self._places:
            _give_back(start, end)

    def restore(self) -> None:
        """Read everything back to where it was, and delete the file."""
        self._file.seek(0)
        for start, end in self._places:
            for at in range(start, end, WRITTEN_AT_ONCE):
                part = _bytes_at(at, min(end, at + WRITTEN_AT_ONCE))
                if self._file.readinto(part) != len(part):
                    raise EngineError("the temporary file with the weights is cut short")
        self._file.close()


def _whole_pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return the address ranges of whole pages that these tensors alone have, each once."""
    spans = sorted(
        {(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.is_contiguous() and t.nbytes}
    )
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    page = mmap.PAGESIZE
    inside = [(-(-start // page) * page, end // page * page) for start, end in merged]
    return [(start, end) for start, end in inside if start < end]


def _bytes_at(start: int, end: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * (end - start)).from_address(start)).cast("B")


def _give_back(start: int, end: int) -> None:
    if _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED):
        raise EngineError("the system does not take this memory back")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
