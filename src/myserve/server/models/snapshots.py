"""Which snapshot a model has, which ones are on their way, and which folder an identity means."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myserve.errors import RequestError
from myserve.wire.weights import LoadingState, Stage

if TYPE_CHECKING:
    # torch is imported when a model is, and not before
    from myserve.engine.weights.queue import WeightUpdate

_STAGES: dict[str, Stage] = {
    "preparing": "loading",
    "draining": "draining",
    "done": "done",
    "failed": "error",
}


class Snapshots:
    """One model's snapshots: the loaded one, and those that were asked for after it, in order."""

    def __init__(self) -> None:
        # What was swapped in, beginning with the last whole snapshot: together they are the weights of now.
        self._lineage: list[tuple[str, WeightUpdate]] = []
        self._asked: deque[tuple[str, WeightUpdate]] = deque()

    def begin(self, engine: Any, identity: str, folder: Path, **options: Any) -> WeightUpdate:
        """Ask the engine for this snapshot; `options` are `Engine.update_weights`'."""
        update: WeightUpdate = engine.update_weights(folder, **options)
        self._asked.append((identity, update))
        return update

    def awaited(self, identity: str) -> WeightUpdate | None:
        """The last update, if it is for this snapshot and still on its way: asked for twice is asked for once."""
        self._settle()
        name, update = self._asked[-1] if self._asked else ("", None)
        return update if name == identity and update is not None and update.stage != "failed" else None

    @property
    def identity(self) -> str | None:
        """The loaded one's; None for the weights that the model was started with."""
        self._settle()
        return self._lineage[-1][0] if self._lineage else None

    @property
    def lineage(self) -> list[tuple[str, WeightUpdate]]:
        """Identities and updates that, in this order, make the model's weights from its folder's."""
        self._settle()
        return self._lineage

    @property
    def newest_identity(self) -> str | None:
        """What will be loaded once all that was asked for is."""
        self._settle()
        good = [identity for identity, update in self._asked if update.stage != "failed"]
        return good[-1] if good else self.identity

    @property
    def checksum(self) -> str | None:
        self._settle()
        return self._lineage[-1][1].result(0).checksum if self._lineage else None

    def loading_state(self) -> LoadingState:
        """Of the first that is on its way; else what became of the last."""
        self._settle()
        if not self._asked:
            target = self.identity
            return {"stage": "idle" if target is None else "done", "target_snapshot_identity": target}
        identity, update = self._asked[0]
        state: LoadingState = {"stage": _STAGES[update.stage], "target_snapshot_identity": identity}
        if (error := update.error) is not None:
            state["error"] = str(error)
        return state

    def _settle(self) -> None:
        """Take in what has ended. A failure is shown until something else is asked for."""
        while self._asked and (self._asked[0][1].stage == "done" or self._is_old_failure()):
            ended = self._asked.popleft()
            if ended[1].stage == "done":
                if not ended[1].options.partial:
                    self._lineage.clear()
                self._lineage.append(ended)

    def _is_old_failure(self) -> bool:
        return self._asked[0][1].stage == "failed" and len(self._asked) > 1


def snapshot_folder(weights_dir: str | None, identity: str) -> Path:
    """The folder of an identity: inside the operator's directory, whatever the identity is. Raises RequestError."""
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
