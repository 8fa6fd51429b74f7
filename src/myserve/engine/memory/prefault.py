"""Memory for a model's weights, had from the system by another thread while Python still imports.

A system hands memory out when it is first written, one page after the other, and on a virtual machine that takes as
long as packing the weights does. Imports no torch: it is to begin before torch is imported.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from myserve.engine.memory.available import free_host_memory

__all__ = ["HUGE_PAGE", "SHARE", "Reserve", "begin", "checkpoint_files"]

log = logging.getLogger(__name__)

HUGE_PAGE = 1 << 21
SHARE = 0.8  # of the free memory; a checkpoint that is larger will be short of memory anyway


class Reserve:
    """A region that is filled with zeros from front to back, and handed out in pieces from front to back.

    Each piece goes back to the system when nothing refers to it any more. (Rejected: `MADV_POPULATE_WRITE`, which keeps
    the process's map of memory locked for as long as the system takes, and imports change that map all the time.)
    """

    def __init__(self, size: int) -> None:
        """`size` in bytes; raises MemoryError."""
        self._address = _map(size := -(-size // HUGE_PAGE) * HUGE_PAGE)
        self._size, self._used = size, 0
        self._writing: int | None = None  # where a step is being filled
        self.num_filled = 0  # bytes that the system has handed out for it
        self._changed = threading.Condition()

    def fill(self) -> Iterator[None]:
        """Fills a step, or has filled them all: never what has been handed out, nor what has been given back."""
        begin = 0
        while True:
            with self._changed:
                begin = max(begin, self._used)
                size = min(HUGE_PAGE - begin % HUGE_PAGE, self._size - begin)
                if size <= 0:
                    return
                self._writing = begin
            ctypes.memset(self._address + begin, 0, size)  # without the GIL
            self.num_filled += size
            with self._changed:
                self._writing = None
                self._changed.notify_all()
            begin += size
            yield

    def take(self, size: int) -> Any:
        """A buffer of `size` zeros at a page's begin, its user's to keep; None where so many are not left."""
        taken = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        begin = self._cut(taken)
        if begin is None:
            return None
        buffer = (ctypes.c_char * size).from_address(self._address + begin)
        # Not at the exit: other threads may compute to the end.
        weakref.finalize(buffer, _unmap, self._address + begin, taken).atexit = False
        return buffer

    def give_back(self) -> int:
        """Return what was not taken to the system, and how many bytes that were: 0 the second time."""
        with self._changed:
            left, self._size = self._size - self._used, self._used
            self._changed.wait_for(lambda: self._writing is None)
        if left:
            _unmap(self._address + self._used, left)
            log.info("of memory asked for ahead of the weights, %d MiB go back", left >> 20)
        return left

    def _cut(self, size: int) -> int | None:
        """Move the beginning of a piece. Waits for a step that is being filled inside it."""
        with self._changed:
            begin = self._used
            if begin + size > self._size:
                return None
            self._used += size
            self._changed.wait_for(lambda: self._writing is None or self._writing >= begin + size)
            return begin


def begin(model: str | os.PathLike[str], *, part: float = 1.0) -> Reserve | None:
    """Start to fill a reserve for the checkpoint in a folder or in the hub's cache, and to read its files.

    `part`: how large its packed weights are of the checkpoint's size. None, and nothing happens, where there is no
    checkpoint, where memory is short, and elsewhere than on Linux.
    """
    files = checkpoint_files(model)
    size = sum(file.stat().st_size for file in files)
    if sys.platform != "linux" or not 0 < size <= SHARE * free_host_memory():
        return None
    try:
        reserve = Reserve(int(size * part))
    except MemoryError:
        return None
    threading.Thread(target=_fill, args=(reserve, files), name="myserve-reserve", daemon=True).start()
    return reserve


def checkpoint_files(model: str | os.PathLike[str]) -> list[Path]:
    """A folder's, or a hub id's in its cache, whose layout is documented: to ask its library is to import it."""
    folder, model = Path(model), os.fspath(model)
    if not folder.is_dir():
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
        repository = cache / f"models--{model.replace('/', '--')}"
        try:
            folder = repository / "snapshots" / (repository / "refs" / "main").read_text().strip()
        except OSError:
            return []
    return sorted(folder.glob("model*.safetensors"))


def _fill(reserve: Reserve, files: list[Path]) -> None:
    """Reads as many bytes ahead as it fills: the disk works while this thread does."""
    ahead = _read_ahead(files)
    for _ in reserve.fill():
        next(ahead, None)


def _read_ahead(files: list[Path]) -> Iterator[None]:
    """Has the system read a step's bytes into its cache of files: it takes no longer request at once."""
    for file in files:
        with file.open("rb", buffering=0) as opened:
            for begin in range(0, file.stat().st_size, HUGE_PAGE):
                os.posix_fadvise(opened.fileno(), begin, HUGE_PAGE, os.POSIX_FADV_WILLNEED)
                yield


def _map(size: int) -> int:
    """Map `size` bytes from the begin of a huge page, in huge pages where the system has them; returns the address."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc().mmap(None, size + HUGE_PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise MemoryError(f"no {size} bytes")
    begin: int = -(-address // HUGE_PAGE) * HUGE_PAGE
    if begin > address:
        _unmap(address, begin - address)
    if begin < address + HUGE_PAGE:
        _unmap(begin + size, address + HUGE_PAGE - begin)
    _libc().madvise(begin, size, getattr(mmap, "MADV_HUGEPAGE", 0))
    return begin


def _unmap(address: int, size: int) -> None:
    _libc().munmap(address, size)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_long)
    libc.munmap.argtypes, libc.madvise.argtypes = (pointer, size), (pointer, size, number)
    return libc
