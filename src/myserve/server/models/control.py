"""Pause, abort and update a served model: what the control planes of all dialects are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from myserve.errors import RequestError
from myserve.server.models.snapshots import snapshot_folder

if TYPE_CHECKING:
    from myserve.engine.weights.prepare import WeightReport  # torch is imported when a model is
    from myserve.server.models.models import ServedModel

__all__ = [
    "MEMORY_TAGS",
    "PauseRequest",
    "compare_checksums",
    "mode_now",
    "pause",
    "release_memory",
    "reset_weights",
    "restore_memory",
    "update_from_folder",
    "update_from_tensors",
]

MEMORY_TAGS = ("kv_cache", "weights")

PauseRequest = Literal["abort", "keep", "retract", "wait"]
UpdateMode = Literal["drain", "keep", "abort"]

WIRE_IDENTITY = "(sent over the wire)"


async def pause(model: ServedModel, mode: PauseRequest) -> int:
    """Run no step from now on; return how many requests were ended for it.

    "abort" ends those in flight with the tokens that they have; the other modes are the engine's. Requests that come in
    while it is paused wait.
    """
    if mode != "abort":
        await model.engine.pause(mode)
        return 0
    # in this order: what comes in between waits
    await model.engine.pause("keep")
    return model.in_flight.abort()


def mode_now(model: ServedModel, otherwise: UpdateMode) -> UpdateMode:
    """Return how an update treats requests in flight: in a pause they stay as the pause has left them."""
    return "keep" if model.engine.is_paused else otherwise


async def update_from_folder(
    model: ServedModel,
    weights_dir: str | None,
    path: str,
    *,
    mode: UpdateMode,
    label: str | None = None,
    **options: Any,
) -> WeightReport:
    """Put a folder's weights in place and return the report. A path may be relative to the weights directory.

    Raises RequestError for a folder outside of it, BadSnapshotError for one that cannot be this model's; then nothing
    was changed. `options`: of `Engine.update_weights`.
    """
    folder: Path = snapshot_folder(weights_dir, path)
    _check_there(model)
    update = model.snapshots.begin(model.engine, path, folder, label, mode=mode, **options)
    report: WeightReport = await update
    return report


async def update_from_tensors(
    model: ServedModel, tensors: Mapping[str, Any], *, mode: UpdateMode, label: str | None = None
) -> WeightReport:
    """Put these tensors in place, the others stay, and return the report. Raises BadSnapshotError."""
    if not tensors:
        raise RequestError("no tensors were sent", code="bad_snapshot")
    _check_there(model)
    update = model.snapshots.begin(model.engine, WIRE_IDENTITY, tensors, label, mode=mode, partial=True)
    report: WeightReport = await update
    return report


async def reset_weights(model: ServedModel) -> None:
    """Put zeros in place of every weight, under a version of their own: a test that the next update replaces all."""
    _check_there(model)
    update = model.engine.reset_weights()
    model.snapshots.note(update, "(zeros)")
    await update


def compare_checksums(now: Mapping[str, str], baseline: Mapping[str, str]) -> list[str]:
    """Return the names whose checksums differ, or that one side has alone.

    >>> compare_checksums({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
    ['b', 'c']
    """
    return sorted(name for name in now.keys() | baseline.keys() if now.get(name) != baseline.get(name))


async def release_memory(model: ServedModel, tags: Collection[str] | None, *, allowed: bool) -> None:
    """Give memory back to the system, by tag or all of it; no step runs until it is restored. Raises RequestError."""
    if not allowed:
        raise RequestError(
            "this server keeps its memory: it was started without --enable-memory-saver",
            code="memory_saver_disabled",
        )
    await model.engine.release_memory(MEMORY_TAGS if tags is None else tags)


async def restore_memory(model: ServedModel, tags: Collection[str] | None) -> None:
    """Bring back what was released, with the values that it had. Harmless where nothing was."""
    await model.engine.restore_memory(MEMORY_TAGS if tags is None else tags)


def _check_there(model: ServedModel) -> None:
    if "weights" in model.engine.released:
        raise RequestError(
            "the memory of the weights is released: resume it before new ones come", code="memory_released"
        )
