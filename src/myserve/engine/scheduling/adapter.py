"""A version of an adapter, as the scheduler knows it: it is a part of the names of the blocks that it computed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AdapterVersion"]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterVersion:
    """One load of an adapter. Its weights never change: a replacement is another version, in another slot."""

    name: str
    version: int  # grows with each load of any adapter of the engine, and is never used again
    slot: int  # its place in the layers' tables
    rank: int = 0  # the highest of its layers
    num_bytes: int = 0  # in memory
    checksum: str = ""
    path: str = ""  # as the caller named it
