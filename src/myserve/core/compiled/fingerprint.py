"""The checksum of compiled code: one number for the sources of a kernel and of all its helpers."""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path

__all__ = ["fingerprint"]


@cache
def fingerprint(*sources: Path) -> int:
    """Checksum the files `sources`; of a folder, every Python file in and below it.

    Every entry point that is kept on disk holds it in a closure cell, and none of its helpers is kept: Numba's cache
    key covers a function's own file and its cells, so without it a change in a file of helpers would be answered
    with the old machine code.

    >>> fingerprint(Path(__file__)) == zlib.crc32(Path(__file__).read_bytes())
    True
    """
    files = [file for each in sources for file in (sorted(each.rglob("*.py")) if each.is_dir() else [each])]
    return zlib.crc32(b"".join(file.read_bytes() for file in files))
