"""A checkpoint whose linear layers are int8: written by `myserve quantize`, loaded without the one that it was made of.

The format is compressed-tensors' `int-quantized` with int8 weights, symmetric per output channel, and int8 activations,
symmetric and dynamic per token: `X.weight` int8 [N, K] and `X.weight_scale` float32 [N, 1]. The output layer stays in
its float type there, as readers of the format expect; `myserve_quantize` in config.json says that we quantise it as it
is loaded, by the same function, so that the bits are those of `--quantize int8` on the original.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.core_model_loading import Concatenate, MergeModulelist
from transformers.pytorch_utils import Conv1D

from myserve.engine.batch_invariance.grouped_linear import is_grouped_linear
from myserve.engine.batch_invariance.own_matrices import is_linear, own_matrices
from myserve.engine.batch_invariance.patch import has_experts
from myserve.engine.batch_invariance.quantized import Int8Values, can_quantize, hold_stored, quantize
from myserve.engine.batch_invariance.scaled_experts import adopt_scaled_experts
from myserve.engine.weights.empty_model import checkpoint_folder, model_without_values
from myserve.engine.weights.loading_report import judge
from myserve.engine.weights.plan import LoadPlan, WeightGroup, WeightNames, group_tensors, make_plan
from myserve.engine.weights.snapshot import INDEX, FolderSnapshot, TensorInfo
from myserve.errors import BadCheckpointError, BadSnapshotError, RequestError, UnsupportedModelError

__all__ = ["MARK", "int8_scheme", "load_int8", "write_int8"]

log = logging.getLogger(__name__)

MARK = "myserve_quantize"  # in config.json: "int8" where the output layer is to be quantised as it is loaded
SCALE = "_scale"  # behind a weight's name
_BYTES = {"num_bits": 8, "type": "int", "symmetric": True}
_WEIGHTS = _BYTES | {"strategy": "channel", "dynamic": False}
_ACTIVATIONS = _BYTES | {"strategy": "token", "dynamic": True}
_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class _Layer:
    """A weight of the model that int8 may hold: whether it lies [..., K, N], and where its K is."""

    is_transposed: bool

    @property
    def inner(self) -> int:
        return -2 if self.is_transposed else -1


def int8_scheme(config: Any) -> bool:
    """Return whether a model's config says that its checkpoint is in this format.

    Another scheme of compressed-tensors is `formats.compressed_tensors`'s, which decodes it.
    """
    described = getattr(config, "quantization_config", None)
    if not isinstance(described, Mapping) or described.get("quant_method") != "compressed-tensors":
        return False
    groups = list((described.get("config_groups") or {}).values())
    fits = described.get("format") == "int-quantized" and len(groups) == 1
    for name, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        found = groups[0].get(name) if fits else None
        fits = isinstance(found, Mapping) and all(found.get(key) == value for key, value in wanted.items())
    return fits and not described.get("kv_cache_scheme")


# --- reading -------------------------------------------------------------------------------------------------


def load_int8(model: str, config: Any, dtype: Any, *, attention: str, trust_remote_code: bool) -> Any:
    """Return transformers' model of an int8 checkpoint, its int8 weights held as they are until they are packed.

    Raises BadCheckpointError for one that is torn, another model's, or not whole.
    """
    folder = checkpoint_folder(model)
    loaded = model_without_values(config, dtype, attention=attention, trust_remote_code=trust_remote_code)
    try:
        _fill(loaded, folder)
    except BadSnapshotError as error:
        raise BadCheckpointError(f"the int8 checkpoint {model} cannot be served: {error}") from error
    with suppress(OSError):  # it need not have one
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def _fill(model: Any, folder: Path) -> None:
    snapshot = FolderSnapshot(folder)
    snapshot.close()  # its headers are good; values come through a mapping of the files, as with any checkpoint
    names, layers = WeightNames.of(model), _layers(model)
    plan, scales = _plan(snapshot.tensors, model, names)
    read = _Files(folder).read
    parameters = model.state_dict(keep_vars=True)
    for group in plan.groups:
        if all(source in scales for source in group.sources):
            _check_scales(group, snapshot.tensors, scales, layers)
            layer, parameter = layers[group.target], parameters[group.target]
            hold_stored(
                parameter,
                partial(_stored, group, layer, read, scales, model=model, dtype=parameter.dtype),
            )
        elif any(source in scales for source in group.sources):
            raise BadSnapshotError(f"only some of the tensors that make {group.target} are int8")
        else:
            for name, value in group.make(read, model).items():
                parameters[name].data = value.to(parameters[name].dtype)


def _plan(
    tensors: Mapping[str, TensorInfo], model: Any, names: WeightNames
) -> tuple[LoadPlan, dict[str, str]]:
    """The plan of all weights, and the name of the scale of each tensor that is int8."""
    scales = {name.removesuffix(SCALE): name for name in tensors if name.endswith(SCALE)}
    ints = {name for name, info in tensors.items() if info.dtype == torch.int8}
    if ints != scales.keys():
        odd = min(ints ^ scales.keys())
        raise BadSnapshotError(f"{odd} has int8 values without scales, or scales without int8 values")
    if not ints:
        raise BadSnapshotError("its config.json says that it is int8, and no tensor is")
    dtype = model.dtype
    values = {
        name: TensorInfo(dtype, info.shape) if name in ints else info
        for name, info in tensors.items()
        if name not in scales.values()
    }
    _, unknown = group_tensors(values, model, names)
    judge(model, {"unexpected_keys": unknown})
    known = {name: info for name, info in values.items() if name not in unknown}
    return make_plan(known, model, names, partial=False, may_cast=True), scales


def _check_scales(
    group: WeightGroup,
    tensors: Mapping[str, TensorInfo],
    scales: Mapping[str, str],
    layers: Mapping[str, _Layer],
) -> None:
    if group.target not in layers:
        raise BadSnapshotError(f"{group.target} is int8, and no linear layer")
    for source in group.sources:
        shape, scale = list(tensors[source].shape), tensors[scales[source]]
        shape[layers[group.target].inner] = 1
        if list(scale.shape) != shape or not scale.dtype.is_floating_point:
            raise BadSnapshotError(f"{scales[source]} has the shape {scale.shape}, not {tuple(shape)}")


def _stored(
    group: WeightGroup,
    layer: _Layer,
    read: Callable[[str], Tensor],
    scales: Mapping[str, str],
    *,
    model: Any,
    dtype: torch.dtype,
) -> Int8Values:
    """Read one weight and its scales, [..., N, K] and [..., N]."""
    values = group.make(read, model)[group.target]
    scale = group.make(lambda name: read(scales[name]), model)[group.target]
    return Int8Values(
        values.transpose(-1, -2) if layer.is_transposed else values,
        scale.squeeze(layer.inner).float(),
        dtype,
    )


class _Files:
    """The tensors of a folder, through a mapping of its files."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
        paths = sorted(folder.glob("*.safetensors") if files is None else (folder / name for name in files))
        opened: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self._files: dict[str, Any] = {name: file for file in opened for name in list(file.keys())}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


# --- writing -------------------------------------------------------------------------------------------------


def write_int8(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> Path:
    """Write an int8 checkpoint of a model, a path or hub id, into the new folder `out`, whole or not at all.

    Raises RequestError where `out` exists, BadCheckpointError for a model that is torn, UnsupportedModelError for one
    that is quantised already.
    """
    model, out = os.fspath(model), Path(out)
    if out.exists():
        raise RequestError(f"{out} exists already; name a folder that does not", param="out")
    folder = checkpoint_folder(model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise BadCheckpointError(f"{model} is no model: {str(error).splitlines()[0]}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{model} is quantised already; take the checkpoint that it was made of")
    structure = model_without_values(config, "auto", attention=None, trust_remote_code=trust_remote_code)
    partial_folder = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        snapshot = FolderSnapshot(folder)
        try:
            kept = _write_tensors(snapshot, structure, partial_folder)
        finally:
            snapshot.close()
        _write_rest(folder, partial_folder, kept)
        partial_folder.rename(out)
    except BadSnapshotError as error:
        raise BadCheckpointError(f"{model} cannot be read: {error}") from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return out


def _layers(model: nn.Module) -> dict[str, _Layer]:
    """The weights that may be int8, by the model's names for them."""
    adopt_scaled_experts(model)
    found: dict[str, _Layer] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if is_linear(module):
            found[prefix + "weight"] = _Layer(isinstance(module, Conv1D))
        elif is_grouped_linear(module):
            found[prefix + "weight"] = _Layer(is_transposed=False)
        elif has_experts(module):
            experts: Any = module
            for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
                found[prefix + name] = _Layer(bool(experts.is_transposed))
    return found


def _write_tensors(snapshot: FolderSnapshot, model: Any, folder: Path) -> list[str]:
    """Write all tensors of the model; return the modules whose weights stay as they are."""
    names, layers = WeightNames.of(model), _layers(model)
    groups, unknown = group_tensors(snapshot.tensors, model, names)
    judge(model, {"unexpected_keys": unknown})
    plan = make_plan(
        {name: info for name, info in snapshot.tensors.items() if name not in unknown},
        model, names, partial=False, may_cast=True,
    )  # fmt: skip
    head = model.get_output_embeddings()
    outputs = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is head.weight}
    written: dict[str, _Layer] = {}
    quantised: set[str] = set()
    for group in plan.groups:
        layer = layers.get(group.target)
        if layer and not outputs & names.twins(group.target) and _keeps_channels(group, names, layer):
            written |= dict.fromkeys(group.sources, layer)
            quantised.add(group.target)
    dtypes = {source: names.infos[g.target].dtype for g in groups for source in g.sources}
    shards = _Shards(folder)
    for name in sorted(dtypes):
        tensor = snapshot.read(name)
        if (layer := written.get(name)) is None:
            shards.add({name: tensor})
            continue
        # as serving rounds it: the model's type first
        weight = tensor.to(dtypes[name])
        shards.add(_as_int8(name, weight, layer))
    shards.finish()
    own = {path for path, module in model.named_modules() if own_matrices(module)}
    return sorted(own | {name.removesuffix(".weight") for name in layers.keys() - quantised})


def _keeps_channels(group: WeightGroup, names: WeightNames, layer: _Layer) -> bool:
    """Return whether a channel of the weight is one of the checkpoint's tensor: as it is, stacked or concatenated."""
    if not can_quantize(names.infos[group.target].shape[layer.inner]):
        return False
    if group.converter is None:
        return True
    operations = group.converter.operations
    return not layer.is_transposed and all(isinstance(o, MergeModulelist | Concatenate) for o in operations)


def _as_int8(name: str, weight: Tensor, layer: _Layer) -> dict[str, Tensor]:
    """int8 values as the weight lies, and the scales, with a 1 where its K was."""
    rows = weight.transpose(-1, -2) if layer.is_transposed else weight
    flat = quantize(rows.reshape(-1, rows.shape[-1]))
    values, scales = flat.values.view(rows.shape), flat.scales.view(*rows.shape[:-1], 1)
    if layer.is_transposed:
        values, scales = values.transpose(-1, -2), scales.transpose(-1, -2)
    return {name: values.contiguous(), name + SCALE: scales.contiguous()}


class _Shards:
    """Tensors to files of a few GiB, and their index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._pending |= tensors
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if sum(tensor.nbytes for tensor in self._pending.values()) > _SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        save_file(self._pending, self._part(len(self._files)), {"format": "pt"})
        self._files.append(list(self._pending))
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

    def finish(self) -> None:
        """Write what is left, and name the files as they are usually named."""
        if self._pending:
            self._write()
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(tensors, file)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _write_rest(source: Path, folder: Path, kept: list[str]) -> None:
    """Write config.json with the scheme, and copy the tokenizer and what else is no weights."""
    config = json.loads((source / "config.json").read_text())
    config[MARK] = "int8"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _WEIGHTS,
                "input_activations": _ACTIVATIONS,
                "output_activations": None,
            }
        },
        "ignore": kept,
        "kv_cache_scheme": None,
    }
    for file in _other_files(source):
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _other_files(source: Path) -> Iterator[Path]:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    for file in source.iterdir():
        if file.is_file() and file.suffix not in weights and not file.name.endswith(".index.json"):
            yield file
