"""Compiled kernels are kept on disk for the next start: where, and whether all of them are there."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import llvmlite.binding
import numba
from numba.core.caching import FunctionCache

from myserve.core.compiled.entry_points import SOURCES
from myserve.core.compiled.fingerprint import fingerprint

__all__ = ["cache_folder", "compiling_alone", "is_complete", "mark_complete"]

log = logging.getLogger("myserve.start")

_in_this_process = threading.Lock()


@cache
def cache_folder() -> Path | None:
    """Return the folder that Numba keeps our code in; None, and one warning, where there is none that it may write."""
    try:
        return Path(FunctionCache(_marker).cache_path)
    except RuntimeError:
        log.warning(
            "compiled kernels cannot be kept, because neither %s nor the user's cache folder can be written: every "
            "start compiles them again; set NUMBA_CACHE_DIR to a folder that this user may write",
            Path(__file__).parent / "__pycache__",
        )
        return None


def is_complete(types: str) -> bool:
    """Return whether every kernel for these types was compiled by this version, for this CPU, and kept."""
    folder = cache_folder()
    return folder is not None and _marker(folder, types).exists()


def mark_complete(types: str) -> None:
    """Note that every kernel for these types is kept."""
    if (folder := cache_folder()) is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _marker(folder, types).touch()
        except OSError:
            log.debug("the note that all kernels are compiled was not written", exc_info=True)


@contextmanager
def compiling_alone() -> Iterator[None]:
    """Run a block while no other thread or process compiles into this folder: whoever comes next finds all of it kept.

    Without, servers that start at once (or the engines of a test run) would each compile the whole, on the same cores.
    """
    with _in_this_process:
        folder = cache_folder()
        if folder is None:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "compiling.lock", os.O_CREAT | os.O_RDWR)
        try:
            # given back with the descriptor, by a process that is killed too
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _marker(folder: Path, types: str) -> Path:
    sources = fingerprint(Path(__file__).parent, *SOURCES)
    cpu = llvmlite.binding.get_host_cpu_name()
    return folder / f"complete-{types}-{sources:08x}-{numba.__version__}-{cpu}"
