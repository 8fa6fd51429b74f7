"""An engine that stopped is loaded again only with the weights that it had, and only a bounded number of times."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from myserve.errors import EngineDeadError, MyserveError
from myserve.server.models.labels import VersionLabels

if TYPE_CHECKING:
    from myserve.engine.weights.queue import WeightUpdate  # torch is imported when a model is
    from myserve.server.models.snapshots import Snapshots

__all__ = ["Files", "LostWeightsError", "RestartRecord", "Restarts", "files_of", "free_memory"]

MOST_RESTARTS = 5
RESTART_WINDOW_SECONDS = 600.0

# of a model's folder: name to size and modification time
Files = Mapping[str, tuple[int, int]]
MODEL_FILE_SUFFIXES = frozenset({".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"})


class LostWeightsError(EngineDeadError):
    """The weights that a stopped engine served are gone; others must not be served under their version."""


class Restarts:
    """Says when an engine may be loaded again: at once, then after 1, 3, 7 and 15 s; five times in ten minutes.

    >>> restarts = Restarts()
    >>> [now for now in range(60) if restarts.is_due(now)], restarts.given_up
    ([0, 2, 6, 14, 30], True)
    """

    def __init__(self) -> None:
        self.given_up = False
        self._begun: deque[float] = deque()
        self._due: float | None = None

    def is_due(self, now: float) -> bool:
        """Return whether a restart is due; true once for each. Called on every tick while the engine is down."""
        if self._due is None and not self.given_up:
            while self._begun and now - self._begun[0] > RESTART_WINDOW_SECONDS:
                self._begun.popleft()
            if len(self._begun) >= MOST_RESTARTS:
                self.given_up = True
            else:
                self._due = now + 2.0 ** len(self._begun) - 1
        if self._due is None or now < self._due:
            return False
        self._due = None
        self._begun.append(now)
        return True


class Restartable(Protocol):
    """The part of a `ServedModel` that is used here."""

    @property
    def engine(self) -> Any: ...
    @property
    def files(self) -> Files: ...
    @property
    def snapshots(self) -> Snapshots: ...
    @property
    def num_restarts(self) -> int: ...


@dataclass(frozen=True, slots=True)
class RestartRecord:
    """Identifies the weights that a stopped engine served, without keeping any of its memory.

    `lineage` has the identities and updates that were swapped in, beginning with the last whole snapshot.
    """

    files: Files
    lineage: tuple[tuple[str, WeightUpdate], ...]
    num_restarts: int
    labels: VersionLabels

    @classmethod
    def of(cls, model: Restartable) -> RestartRecord:
        """Return the record of a model."""
        labels = model.snapshots.labels.copy()
        return cls(model.files, tuple(model.snapshots.lineage), model.num_restarts, labels)

    def check_files(self, now: Files) -> None:
        """Raise LostWeightsError where the model's files are not those that the stopped engine was loaded from."""
        changed = sorted(name for name in {*self.files, *now} if self.files.get(name) != now.get(name))
        if changed:
            raise LostWeightsError(
                f"its engine stopped, and {changed[0]} in its folder has changed since it was loaded: a restart "
                "would serve another model; restart the server to serve it"
            )

    def restore(self, model: Restartable) -> None:
        """Swap the lineage in again, under the same versions. Raises LostWeightsError where a checksum differs."""
        for identity, update in self.lineage:
            report = update.result(0)
            if isinstance(update.source, Mapping):
                raise LostWeightsError(
                    f"its engine stopped, and its weights, version {report.weight_version}, came over the wire and are "
                    "in no folder: restart the server, and send them again"
                )
            again = model.snapshots.begin(
                model.engine,
                identity,
                Path(str(update.source)),
                partial=update.options.partial,
                version=report.weight_version,
                checksum=report.checksum,
            )
            try:
                again.result()
            except MyserveError as error:
                raise LostWeightsError(
                    f"its engine stopped, and its weights, version {report.weight_version} from {identity!r}, cannot "
                    f"be had again: {error}; restart the server, and load weights that it has"
                ) from error


def files_of(model: str) -> Files:
    """Return the files that a model is loaded from, without reading them; of a hub id, those in the cache."""
    folder = Path(model)
    if folder.is_file():  # GGUF: all of the model is in one
        stat = folder.stat()
        return {folder.name: (stat.st_size, stat.st_mtime_ns)}
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            return {}
        folder = Path(cached).parent
    files = [path for path in folder.iterdir() if path.suffix in MODEL_FILE_SUFFIXES and path.is_file()]
    stats = {path.name: path.stat() for path in files}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def free_memory() -> None:
    """Collect a model that is no longer used: an engine is full of cycles, and `gc.freeze` hid them."""
    gc.unfreeze()
    gc.collect()
