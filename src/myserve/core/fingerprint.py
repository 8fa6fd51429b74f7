"""What compiled code was made of: one number for the sources of a kernel and of all its helpers."""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path


@cache
def fingerprint(folder: Path, *names: str) -> int:
    """A checksum of the files `names` in `folder`.

    Every entry point that is kept on disk holds it in a closure cell, and none of its helpers is kept: Numba's cache
    key covers a function's own file and its cells, so without it a change in a file of helpers would be answered
    with the old machine code.

    >>> fingerprint(Path(__file__).parent, "fingerprint.py") == zlib.crc32(Path(__file__).read_bytes())
    True
    """
    return zlib.crc32(b"".join((folder / name).read_bytes() for name in names))
