"""A model's snapshots: the one that is loaded, those that are being loaded, and the folder of an identity."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myserve.errors import RequestError
from myserve.server.models.labels import VersionLabels
from myserve.wire.weights import LoadingState, Stage

if TYPE_CHECKING:
    # imports torch
    from myserve.engine.weights.queue import WeightUpdate

__all__ = ["Snapshots", "snapshot_folder"]

_STAGES: dict[str, Stage] = {
    "preparing": "loading",
    "draining": "draining",
    "done": "done",
    "failed": "error",
}


class Snapshots:
    """One model's snapshots: the loaded one, and those requested after it, in order."""

    def __init__(self, labels: VersionLabels | None = None) -> None:
        self.labels = labels or VersionLabels()
        # checksums of the weights, as SGLang's clients have them remembered
        self.remembered: dict[str, str] | None = None
        # swapped in, beginning with the last whole snapshot: together they make the current weights
        self._lineage: list[tuple[str, WeightUpdate]] = []
        self._requested: deque[tuple[str, WeightUpdate]] = deque()

    def begin(
        self, engine: Any, identity: str, source: Any, label: str | None = None, **options: Any
    ) -> WeightUpdate:
        """Request this snapshot from the engine and return its update; `options` are `Engine.update_weights`'.

        `source`: a folder, or tensors by name. `label`: what the weights are called; a number that grows is their
        version as well.
        """
        if label is not None:
            options["version"] = VersionLabels.number(label, engine.weight_version)
        update: WeightUpdate = engine.update_weights(source, **options)
        if label is not None:
            # before the first step by the new weights, so that no token of theirs goes by another name
            update.when_done(lambda report: self.labels.set(report.weight_version, label))
        self._requested.append((identity, update))
        return update

    def note(self, update: WeightUpdate, identity: str) -> None:
        """Take an update into account that was requested elsewhere."""
        self._requested.append((identity, update))

    def awaited(self, identity: str) -> WeightUpdate | None:
        """Return the last update if it is for this snapshot and has not failed: a repeated request starts no other."""
        self._settle()
        name, update = self._requested[-1] if self._requested else ("", None)
        return update if name == identity and update is not None and update.stage != "failed" else None

    @property
    def identity(self) -> str | None:
        """Return the loaded snapshot's; None for the weights that the model was started with."""
        self._settle()
        return self._lineage[-1][0] if self._lineage else None

    @property
    def lineage(self) -> list[tuple[str, WeightUpdate]]:
        """Return the identities and updates that, in this order, make the current weights from the folder's."""
        self._settle()
        return self._lineage

    @property
    def newest_identity(self) -> str | None:
        """Return the identity that will be loaded once every requested update is done."""
        self._settle()
        good = [identity for identity, update in self._requested if update.stage != "failed"]
        return good[-1] if good else self.identity

    @property
    def checksum(self) -> str | None:
        self._settle()
        return self._lineage[-1][1].result(0).checksum if self._lineage else None

    def loading_state(self) -> LoadingState:
        """Return the state of the first update that is not done; else how the last one ended."""
        self._settle()
        if not self._requested:
            target = self.identity
            return {"stage": "idle" if target is None else "done", "target_snapshot_identity": target}
        identity, update = self._requested[0]
        state: LoadingState = {"stage": _STAGES[update.stage], "target_snapshot_identity": identity}
        if (error := update.error) is not None:
            state["error"] = str(error)
        return state

    def _settle(self) -> None:
        """Move updates that are done into the lineage. A failure stays until another update is requested."""
        while self._requested and (self._requested[0][1].stage == "done" or self._is_old_failure()):
            ended = self._requested.popleft()
            if ended[1].stage == "done":
                if not ended[1].options.partial:
                    self._lineage.clear()
                self._lineage.append(ended)

    def _is_old_failure(self) -> bool:
        return self._requested[0][1].stage == "failed" and len(self._requested) > 1


def snapshot_folder(weights_dir: str | None, identity: str) -> Path:
    """Return an identity's folder, which lies inside the operator's directory. Raises RequestError."""
    if weights_dir is None:
        raise RequestError(
            "this server takes no new weights: it was started without --weights-dir", code="weights_disabled"
        )
    root = Path(weights_dir).resolve()
    try:
        folder = (root / identity).resolve()
    except (ValueError, OSError):
        folder = root
    if folder == root or not folder.is_relative_to(root):
        raise RequestError(
            f"{identity[:200]!r} is no folder inside the server's weights directory", code="bad_snapshot"
        )
    return folder
