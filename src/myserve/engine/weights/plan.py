"""The map from a snapshot's tensors to the model's weights; what does not fit is refused before any is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadSnapshotError

__all__ = ["LoadPlan", "WeightGroup", "WeightNames", "group_tensors", "make_plan"]

HALVES = {torch.bfloat16, torch.float16}


@dataclass(frozen=True, slots=True)
class WeightNames:
    """A model's weights as transformers names them: what each is, and which are one tensor under several names."""

    infos: Mapping[str, TensorInfo]
    tied: Sequence[frozenset[str]]
    removed: tuple[str, ...] = ()  # prefixes of modules that the checkpoint has and no text needs: towers

    @classmethod
    def of(cls, model: nn.Module, removed: tuple[str, ...] = ()) -> WeightNames:
        """Return the names of a model as it was loaded, before `make_exact`.

        >>> WeightNames.of(nn.Linear(3, 2)).infos["weight"].shape
        (2, 3)
        """
        infos: dict[str, TensorInfo] = {}
        names_of: dict[int, set[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            infos[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
            names_of.setdefault(id(tensor), set()).add(name)
        return cls(infos, [frozenset(names) for names in names_of.values() if len(names) > 1], removed)

    def twins(self, name: str) -> frozenset[str]:
        """Return all names of the tensor that has this name."""
        return next((names for names in self.tied if name in names), frozenset([name]))


@dataclass(slots=True)
class WeightGroup:
    """Tensors of a snapshot that together make one or several weights: mostly one that makes one, as it is.

    A checkpoint's experts are a tensor each, and stacked in the model; transformers' own converters describe how.
    """

    target: str
    sources: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None
    patterns: list[str] = field(default_factory=list)  # of the converter, a source each

    def make(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """Return the weights, by name."""
        if self.converter is None:
            return {self.target: read(self.sources[0])}
        converter: Any = deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.target, source, pattern, read(source))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The groups, and of each weight that they make the group that makes it."""

    groups: list[WeightGroup]
    group_of: dict[str, WeightGroup]
    names: WeightNames

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights that change; tied ones under each name: an embedding stays beside its product."""
        return sum(self.names.infos[name].num_bytes for name in self.needed_by(self.names.infos))

    def needed_by(self, names: Iterable[str]) -> dict[str, dict[str, WeightGroup]]:
        """Return those of these weights that change, with the groups that make them: tied ones under any name."""
        needed = {
            n: {t: self.group_of[t] for t in sorted(self.names.twins(n) & self.group_of.keys())}
            for n in names
        }
        return {name: groups for name, groups in needed.items() if groups}


def make_plan(
    tensors: Mapping[str, TensorInfo], model: Any, names: WeightNames, *, partial: bool, may_cast: bool
) -> LoadPlan:
    """Plan how a snapshot becomes the model's weights. Raises BadSnapshotError for what does not fit or is missing.

    `partial`: only some of the weights are there. `may_cast`: another floating dtype is rounded to the model's.
    """
    if not tensors:
        raise BadSnapshotError("the snapshot has no tensors")
    groups, unknown = group_tensors(tensors, model, names)
    if unknown:
        raise BadSnapshotError(f"the model has no {_listed(unknown)}")
    made_by: dict[str, WeightGroup] = {}
    for group in groups:
        for name, info in _made_infos(group, tensors, model).items():
            if name in made_by:
                raise BadSnapshotError(f"the snapshot has {name} twice, under two names")
            _check(name, info, names, group)
            _check_dtype(name, [tensors[source].dtype for source in group.sources], names, may_cast=may_cast)
            made_by[name] = group
    missing = [name for name in names.infos if not made_by.keys() & names.twins(name)]
    if missing and not partial:
        raise BadSnapshotError(
            f"the snapshot lacks {_listed(missing)}; to change only some of the weights, say partial"
        )
    return LoadPlan(groups, made_by, names)


def group_tensors(
    tensors: Iterable[str], model: Any, names: WeightNames
) -> tuple[list[WeightGroup], list[str]]:
    """Return which tensors make which weight together, and those that make none; a removed tower's are neither."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, WeightGroup] = {}
    unknown: list[str] = []
    for name in sorted(tensors, key=_natural):
        if name in names.infos:
            target, pattern = name, None
        else:
            target, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, dict(names.infos)
            )
        if target not in names.infos:
            if not target.startswith(names.removed):
                unknown.append(name)
            continue
        group = groups.setdefault(target, WeightGroup(target))
        if group.sources and (pattern is None or group.converter is None):
            raise BadSnapshotError(f"the snapshot has {target} twice: as {group.sources[0]} and as {name}")
        group.converter = converter_of[pattern] if pattern is not None else None
        group.sources.append(name)
        group.patterns.append(pattern or "")
    return list(groups.values()), unknown


def _made_infos(group: WeightGroup, tensors: Mapping[str, TensorInfo], model: Any) -> dict[str, TensorInfo]:
    """Return what the group makes, found by making it of tensors without memory."""

    def empty(name: str) -> Tensor:
        return torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta")

    try:
        made = group.make(empty, model)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise BadSnapshotError(
            f"{group.target} cannot be made of {_listed(group.sources)}: they do not fit each other"
        ) from error
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}


def _check(name: str, info: TensorInfo, names: WeightNames, group: WeightGroup) -> None:
    wanted = names.infos.get(name)
    if wanted is None:
        raise BadSnapshotError(f"the model has no {name}")
    if info.shape != wanted.shape:
        made = "" if group.sources == [name] else f", made of {_listed(group.sources)},"
        raise BadSnapshotError(f"{name}{made} has the shape {info.shape}; the model's is {wanted.shape}")


def _check_dtype(name: str, dtypes: Iterable[torch.dtype], names: WeightNames, *, may_cast: bool) -> None:
    wanted = names.infos[name].dtype
    # a model in half precision keeps some weights in float32 (HY-V4 its head), whatever its checkpoints have
    widened = {info.dtype for info in names.infos.values()} & HALVES if wanted == torch.float32 else set()
    for dtype in dtypes:
        # 8-bit floats are nothing without their scales
        castable = may_cast and dtype.is_floating_point and wanted.is_floating_point and dtype.itemsize > 1
        if dtype != wanted and dtype not in widened and not castable:
            raise BadSnapshotError(
                f"{name} is {dtype} and the model's is {wanted}; save it so, or load the model with an explicit "
                "dtype, to which then every snapshot is rounded"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _natural(name: str) -> list[tuple[int, str]]:
    """Expert 10 after expert 9: the order in which they are stacked."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
