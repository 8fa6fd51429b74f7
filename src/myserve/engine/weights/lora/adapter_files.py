"""From an adapter's folder to packed weights of each layer: all is read and checked before anything changes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from myserve.engine.batch_invariance.low_rank import AdapterMemory, LowRankWeights, packed_shapes
from myserve.engine.memory.device import free_memory
from myserve.engine.weights.lora.adapter_config import CONFIG, AdapterConfig, read_config
from myserve.engine.weights.lora.targets import LoraPart, LoraTarget, find_targets, place_parts
from myserve.engine.weights.plan import WeightNames
from myserve.engine.weights.prepare import CheckingReader
from myserve.engine.weights.snapshot import Snapshot, TensorInfo, open_snapshot
from myserve.errors import BadAdapterError, BadSnapshotError, NotEnoughMemoryError

__all__ = ["PreparedAdapter", "prepare_adapter"]

_PREFIX = "base_model.model."
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter's weights beside those that serve: what it changes, by one product or one for each expert."""

    changes: Sequence[tuple[LoraTarget, Sequence[LowRankWeights]]]
    num_bytes: int
    checksum: str
    duration: float  # seconds

    @property
    def rank(self) -> int:
        """The highest of its layers', padded."""
        return max(weights.rank for _, each in self.changes for weights in each)


def prepare_adapter(folder: Path, model: nn.Module, weight_names: WeightNames) -> PreparedAdapter:
    """Read, check and pack a PEFT adapter for a model whose layers are exact.

    A and B of another floating dtype are rounded to that of their layer. `weight_names`: of the model as it was loaded.
    Raises BadAdapterError for what cannot be this model's adapter, NotEnoughMemoryError.
    """
    began = time.monotonic()
    config = read_config(folder)
    try:
        snapshot = open_snapshot(folder)
    except BadSnapshotError as error:
        raise BadAdapterError(error.message) from error
    try:
        return _prepared(snapshot, config, model, weight_names, began)
    except BadSnapshotError as error:
        raise BadAdapterError(error.message) from error
    finally:
        snapshot.close()


def _prepared(
    snapshot: Snapshot, config: AdapterConfig, model: nn.Module, weight_names: WeightNames, began: float
) -> PreparedAdapter:
    pairs = _pairs(snapshot.tensors)
    targets = find_targets(model)
    sizes = {name: (infos["lora_A"].shape[1], infos["lora_B"].shape[0]) for name, infos in pairs.items()}
    placed = place_parts(sizes, targets, config, model, weight_names)
    name_of = {part: name for name, part in placed.items()}
    changed = [target for target in targets.values() if target.parts]
    for target in changed:
        for part in target.parts:
            _check_shapes(part, pairs[name_of[part]], target, config)
    memory = _memory(config, changed)
    reader = CheckingReader(snapshot)

    def read(part: LoraPart, factor: str, dtype: torch.dtype) -> torch.Tensor:
        return reader.read(f"{_PREFIX}{name_of[part]}.{factor}.weight").to(dtype)

    changes = []
    for target in changed:
        scale = target.scale_of(config)
        made = {
            part: (read(part, "lora_A", target.dtype), read(part, "lora_B", target.dtype))
            for part in target.parts
        }
        changes.append((target, [LowRankWeights.of(a, b, scale, memory) for a, b in target.factors(made)]))
    return PreparedAdapter(changes, memory.num_bytes, reader.checksum.value(), time.monotonic() - began)


def _pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return A and B of each layer by its name. Raises BadAdapterError for any tensor that is neither."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor, info in tensors.items():
        path, _, factor = tensor.removesuffix(".weight").rpartition(".")
        name = path.removeprefix(_PREFIX)
        if factor not in ("lora_A", "lora_B") or not tensor.endswith(".weight") or name == path:
            raise BadAdapterError(
                f"{tensor[:200]} is no A or B of a linear layer: tensors are named {_PREFIX}LAYER.lora_A.weight and "
                "lora_B.weight, and nothing else is served"
            )
        if info.dtype not in _FLOATS or len(info.shape) != 2:
            raise BadAdapterError(
                f"{tensor} is {info.dtype} {info.shape}; matrices of float32, bfloat16 and float16 are read"
            )
        pairs.setdefault(name, {})[factor] = info
    for name, infos in pairs.items():
        if len(infos) < 2:
            raise BadAdapterError(
                f"the adapter has {next(iter(infos))} of {name} alone: A and B belong together"
            )
    if not pairs:
        raise BadAdapterError("the adapter has no tensors")
    return pairs


def _check_shapes(
    part: LoraPart, infos: Mapping[str, TensorInfo], target: LoraTarget, config: AdapterConfig
) -> None:
    for factor, shape in zip(("lora_A", "lora_B"), target.shapes_of(part, config), strict=True):
        if infos[factor].shape != shape:
            raise BadAdapterError(
                f"{part.name}.{factor} has the shape {infos[factor].shape}; with rank {config.rank_of(part.name)} of "
                f"{CONFIG} it is {shape}"
            )


def _memory(config: AdapterConfig, changed: Sequence[LoraTarget]) -> AdapterMemory:
    """Return memory for all packed weights. Raises NotEnoughMemoryError."""
    shapes = [
        shape
        for target in changed
        for shape in packed_shapes(
            target.rank_of(config), target.in_features, target.out_features, target.dtype
        )
        * max(1, target.experts)
    ]
    dtypes = {target.dtype for target in changed}
    if len(dtypes) > 1:
        raise BadAdapterError("an adapter of layers of several dtypes is not served")
    (dtype,) = dtypes
    num_bytes, free = sum(map(math.prod, shapes)) * dtype.itemsize, free_memory(torch.device("cpu"))
    if num_bytes > free:
        raise NotEnoughMemoryError(
            f"an adapter of {num_bytes >> 20} MiB does not fit: {free >> 20} MiB are free; nothing was changed"
        )
    return AdapterMemory(shapes, dtype)
