"""The changes of a fleet since it began: by them a new replica gets the weights and adapters of the others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

__all__ = ["Adapter", "Change", "FleetJournal", "FleetWeights", "JournalStore"]

Mode = Literal["drain", "keep", "abort"]


@dataclass(frozen=True, slots=True)
class FleetWeights:
    """New weights, as all replicas have them."""

    folder: str
    weight_version: int
    partial: bool = False
    checksum: str | None = None
    mode: Mode = "drain"
    refuse_new: bool = False
    reset_prefix_cache: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was loaded, or taken away: then it has no folder."""

    name: str
    folder: str | None = None
    path: str | None = None
    replaces: bool = True
    mode: Mode = "drain"


Change = FleetWeights | Adapter


class JournalStore(Protocol):
    """Keeps one value beyond the life of the process that writes it: whole, or the one before."""

    def read(self) -> bytes | None: ...
    def write(self, body: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class FleetJournal:
    """The published state of a fleet, and the transaction that is on its way.

    `changes`, made in this order on a freshly loaded replica, give it the published weights and adapters. `pending` is
    a snapshot in phase "prepare", which may still be dropped, or "swap", which is decided: whoever reads the journal
    then carries it through.

    >>> journal = FleetJournal().with_change(FleetWeights("/w/1", 1)).with_change(FleetWeights("/w/2", 2, partial=True))
    >>> journal.weight_version, len(journal.changes)
    (2, 2)
    >>> len(journal.with_change(FleetWeights("/w/3", 3)).changes)
    1
    """

    changes: tuple[Change, ...] = ()
    pending: FleetWeights | None = None
    phase: Literal["idle", "prepare", "swap"] = "idle"
    paused: str | None = None  # the mode of a pause that `resume` has not ended
    released: tuple[str, ...] = ()  # memory that was not restored

    @property
    def weight_version(self) -> int:
        versions = [change.weight_version for change in self.changes if isinstance(change, FleetWeights)]
        return versions[-1] if versions else 0

    @property
    def checksum(self) -> str | None:
        snapshots = [change for change in self.changes if isinstance(change, FleetWeights)]
        return snapshots[-1].checksum if snapshots else None

    def with_change(self, change: Change) -> FleetJournal:
        """Return the journal with a change that all have made; what it makes void is left out."""
        kept = self.changes
        if isinstance(change, FleetWeights) and not change.partial:
            kept = tuple(c for c in kept if isinstance(c, Adapter))
        return replace(self, changes=(*kept, change))

    def missing(self, weight_version: int, num_adapter_changes: int) -> tuple[Change, ...]:
        """Return what a replica has yet to take that is of this version and has made so many adapters' changes."""
        adapters = [change for change in self.changes if isinstance(change, Adapter)][num_adapter_changes:]
        return tuple(
            change
            for change in self.changes
            if (change in adapters if isinstance(change, Adapter) else change.weight_version > weight_version)
        )

    def write(self, store: JournalStore) -> None:
        """Put the journal in a store, in place of the one before."""
        store.write(json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, store: JournalStore) -> FleetJournal:
        """Return the journal of a store; an empty one where none was written."""
        body = store.read()
        if body is None:
            return cls()
        found = json.loads(body)
        changes = tuple(_change(change) for change in found.pop("changes"))
        pending = found.pop("pending")
        found["released"] = tuple(found["released"])
        return cls(changes, None if pending is None else FleetWeights(**pending), **found)


def _change(found: dict[str, Any]) -> Change:
    return FleetWeights(**found) if "weight_version" in found else Adapter(**found)
