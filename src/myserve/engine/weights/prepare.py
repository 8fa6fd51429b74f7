"""From a snapshot to installs that put it in place: everything is read, checked and packed before the first is done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from myserve.engine.memory.device import free_memory
from myserve.engine.weights.holders import Install, holders
from myserve.engine.weights.plan import LoadPlan, WeightNames, make_plan
from myserve.engine.weights.snapshot import Checksum, Snapshot, open_snapshot
from myserve.errors import BadSnapshotError, NotEnoughMemoryError, RequestError

__all__ = [
    "MODES",
    "CheckingReader",
    "Mode",
    "Prepared",
    "Source",
    "UpdateOptions",
    "WeightReport",
    "prepare",
]

Mode = Literal["drain", "keep", "abort"]
Source = str | Path | Mapping[str, Tensor]
MODES = ("drain", "keep", "abort")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """Options of an update: in which order requests and weights go.

    >>> UpdateOptions(mode="later")
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: mode must be one of drain, keep, abort, got 'later'
    """

    mode: Mode = "drain"
    partial: bool = False  # the snapshot has only some of the weights; the others stay
    version: int | None = None  # what the weights are called from then on; None: one more than now
    checksum: str | None = None  # what `weights_checksum` must give
    refuse_new: bool = False  # while others drain, new requests are refused instead of kept waiting
    reset_prefix_cache: bool = False  # give its memory back at once; old blocks are never found either way

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RequestError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}", param="mode")


@dataclass(frozen=True, slots=True)
class WeightReport:
    """The result of an update. Durations in seconds."""

    weight_version: int
    checksum: str
    num_tensors: int  # of the snapshot
    num_bytes: int
    prepare_duration: float  # reading, checking, packing: the old weights serve meanwhile
    drain_duration: float  # until requests in flight had finished
    pause_duration: float  # in which no step ran
    num_aborted: int


@dataclass(slots=True)
class Prepared:
    """New weights beside the old ones. `install` cannot fail."""

    installs: list[Install]
    checksum: str
    num_tensors: int
    num_bytes: int
    duration: float

    def install(self) -> None:
        """Put the new weights in place: pointers change, joined products are copied into the memory they share."""
        for install in self.installs:
            install()


def prepare(
    source: Source, model: Any, names: WeightNames, *, partial: bool, checksum: str | None, may_cast: bool
) -> Prepared:
    """Read, check and pack new weights. Raises BadSnapshotError, NotEnoughMemoryError.

    Takes as much memory as the weights that change (tied ones under each of their names), and one tensor more.
    """
    began = time.monotonic()
    snapshot = open_snapshot(source)
    try:
        plan = make_plan(snapshot.tensors, model, names, partial=partial, may_cast=may_cast)
        num_bytes = sum(info.num_bytes for info in snapshot.tensors.values())
        _check_memory(
            plan.num_bytes + max(info.num_bytes for info in snapshot.tensors.values()), model.device
        )
        reader = CheckingReader(snapshot)
        installs = _installs(plan, reader.read, model)
        value = reader.checksum.value()
        if checksum is not None and checksum != value:
            raise BadSnapshotError(f"the checksum is {value}, not {checksum}", param="checksum")
        return Prepared(installs, value, len(snapshot.tensors), num_bytes, time.monotonic() - began)
    finally:
        snapshot.close()


def _check_memory(num_bytes: int, device: torch.device) -> None:
    free = free_memory(device)
    if num_bytes > free:
        raise NotEnoughMemoryError(
            f"{num_bytes >> 20} MiB of new weights do not fit beside the old ones: {free >> 20} MiB are free; "
            "nothing was changed"
        )


@dataclass(slots=True)
class CheckingReader:
    """Reads each tensor once; what it gives is finite and counted in the checksum."""

    snapshot: Snapshot
    checksum: Checksum = field(default_factory=Checksum)

    def read(self, name: str) -> Tensor:
        tensor = self.snapshot.read(name)
        self.checksum.add(name, tensor)
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # one pass without a mask; NaN comes through
            if not (low.isfinite() and high.isfinite()):
                raise BadSnapshotError(f"{name} has values that are not finite")
        return tensor


def _installs(plan: LoadPlan, read: Callable[[str], Tensor], model: Any) -> list[Install]:
    """Holder by holder; a tensor of the snapshot is read when first needed and dropped when last."""
    needed = [(holder, plan.needed_by(holder.names)) for holder in holders(model)]
    uses = Counter(
        group.target for _, needs in needed for groups in needs.values() for group in groups.values()
    )
    assert len(uses) == len(plan.groups), "a weight that no holder has"
    made: dict[str, dict[str, Tensor]] = {}  # by the group's target
    installs: list[Install] = []
    for holder, needs in needed:
        values: dict[str, Tensor] = {}
        for name, groups in needs.items():
            for group in groups.values():
                if group.target not in made:
                    made[group.target] = group.make(read, model)
            values[name] = _the_one({twin: made[group.target][twin] for twin, group in groups.items()})
        if values:
            installs += holder.prepare(values)
        for group in (group for groups in needs.values() for group in groups.values()):
            uses[group.target] -= 1
            if not uses[group.target]:
                del made[group.target]
    return installs


def _the_one(twins: Mapping[str, Tensor]) -> Tensor:
    """The tensor that stands under all these names. Raises BadSnapshotError where they differ."""
    first, *others = twins.values()
    if any(not torch.equal(first, other) for other in others):
        raise BadSnapshotError(
            f"{' and '.join(twins)} are one tensor in this model, and differ in the snapshot"
        )
    return first
