"""The weights of a GGUF file under transformers' names: each is made of one or several of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from myserve.engine.weights.formats.from_gguf.architectures import Architecture, Parts
from myserve.engine.weights.formats.from_gguf.config import architecture_of
from myserve.engine.weights.formats.from_gguf.file import GgufFile, need_gguf
from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadCheckpointError

__all__ = ["GgufSnapshot", "scale_frequencies"]

_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def scale_frequencies(model: Any, file: GgufFile) -> None:
    """Divide a model's RoPE frequencies by the file's own factors: Llama 3.1's scaling, which GGUF has as a tensor."""
    if _ROPE_FACTORS not in file.tensors:
        return
    factors = torch.from_numpy(file.read(_ROPE_FACTORS).astype("float32"))
    rotary = [m for m in model.modules() if hasattr(m, "inv_freq")]
    if not rotary or any(m.inv_freq.shape != factors.shape for m in rotary):
        raise BadCheckpointError(
            f"{_ROPE_FACTORS} of {file.path.name} has another shape than the model's frequencies"
        )
    for module in rotary:
        for name in ("inv_freq", "original_inv_freq"):
            if getattr(module, name, None) is not None:
                setattr(module, name, getattr(module, name) / factors)


class GgufSnapshot:
    """The weights of a file under the names of transformers' model, in the model's types, as a `Snapshot`."""

    def __init__(self, file: GgufFile, model: Any) -> None:
        self._file = file
        self._config = model.config.get_text_config(decoder=True)
        self._undo = architecture_of(file)[1].undo
        self.tensors: dict[str, TensorInfo] = {}
        self._parts = _parts_of_weights(file, model)
        _refuse_others(file, {name for parts in self._parts.values() for name in parts.names}, self._config)
        weights = model.state_dict()
        for weight, parts in self._parts.items():
            self.tensors[weight] = TensorInfo(weights[weight].dtype, self._shape(weight, parts))

    def read(self, name: str) -> Tensor:
        return self._made(self._parts[name], self.tensors[name].dtype, self._values)

    def close(self) -> None:
        """The file is mapped, and closed with the last that reads it."""

    def _values(self, source: str) -> Tensor:
        return torch.from_numpy(self._file.read(source)).float()

    def _empty(self, source: str) -> Tensor:
        return torch.empty(self._file.tensors[source].shape, device="meta")

    def _made(self, parts: Parts, dtype: torch.dtype, read: Callable[[str], Tensor]) -> Tensor:
        """Return a weight; each part of it is rounded before they are joined, so that one is in float32 at a time."""
        undone = [self._undone(name, read(name)).to(dtype) for name in parts.names]
        return undone[0] if len(undone) == 1 else parts.join(undone, self._config)

    def _undone(self, name: str, values: Tensor) -> Tensor:
        for undo in self._undo.get(_BLOCK.sub("", name), ()):
            try:
                values = undo(values, self._config)
            except BadCheckpointError as error:
                raise BadCheckpointError(f"{name}: {error}") from error
        return values

    def _shape(self, weight: str, parts: Parts) -> tuple[int, ...]:
        """Return a weight's shape, found by making it of tensors without memory."""
        try:
            return tuple(self._made(parts, torch.float32, self._empty).shape)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{name} {self._file.tensors[name].shape}" for name in parts.names)
            raise BadCheckpointError(
                f"{weight} of the model that its metadata describe cannot be made of {shapes}"
            ) from error


def _parts_of_weights(file: GgufFile, model: Any) -> dict[str, Parts]:
    """Return of each weight of a model which tensors of a file make it; a weight that has none there is left out."""
    gguf = need_gguf()
    name, architecture = architecture_of(file)
    arch = next(key for key, written in gguf.MODEL_ARCH_NAMES.items() if written == name)
    table = gguf.get_tensor_name_map(arch, int(model.config.num_hidden_layers))
    found: dict[str, Parts] = {}
    for weight in model.state_dict():
        parts = _parts_by_ending(weight, architecture, file) or _part_by_table(weight, architecture, table)
        if parts is None or not any(part in file.tensors for part in parts.names):
            continue
        if missing := [part for part in parts.names if part not in file.tensors]:
            raise BadCheckpointError(f"it has not all of {weight}: {missing[0]} is not there")
        found[weight] = parts
    return found


def _parts_by_ending(weight: str, architecture: Architecture, file: GgufFile) -> Parts | None:
    """Return what makes a weight that an architecture has a line for: of several the first that the file has."""
    choices = next((parts for ending, parts in architecture.parts.items() if weight.endswith(ending)), ())
    layer = _LAYER.search(weight)
    if not choices or layer is None:
        return None
    named = [replace(choice, names=tuple(f"blk.{layer[1]}.{n}" for n in choice.names)) for choice in choices]
    return next((parts for parts in named if any(n in file.tensors for n in parts.names)), named[0])


def _part_by_table(weight: str, architecture: Architecture, table: Any) -> Parts | None:
    """Return the tensor that makes a weight by llama.cpp's own table of names."""
    for theirs, ours in architecture.renamed:
        weight = weight.replace(theirs, ours)
    stem, dot, suffix = weight.rpartition(".")
    written = table.get_name(stem) if suffix in ("weight", "bias") else None
    return Parts((written + dot + suffix,)) if written is not None else None


def _refuse_others(file: GgufFile, read: Collection[str], config: Any) -> None:
    """Raise BadCheckpointError for a tensor that makes no weight, but for layers behind the model's own."""
    blocks = int(file.metadata[f"{architecture_of(file)[0]}.block_count"])
    behind = range(int(config.num_hidden_layers), blocks)
    for name in file.tensors.keys() - read - {_ROPE_FACTORS}:
        block = _BLOCK.match(name)
        if block is None or int(block[1]) not in behind:
            raise BadCheckpointError(f"the model that its metadata describe has no place for {name}")
