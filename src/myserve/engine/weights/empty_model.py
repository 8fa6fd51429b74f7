"""A model of transformers without values, filled from named tensors: every weight of it is given, or it is refused."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from myserve.engine.weights.loading_report import judge
from myserve.engine.weights.plan import WeightNames, group_tensors, make_plan
from myserve.engine.weights.snapshot import Snapshot
from myserve.errors import RequestError

__all__ = [
    "BUILDING",
    "auto_class",
    "checkpoint_folder",
    "fill",
    "has_more_than_text",
    "keep_text_alone",
    "model_without_values",
    "names_of_towers",
]

# Transformers builds a model under functions that it replaces for the whole process (`tie_weights` among them), and
# puts back what it found: of two threads that build at once, one puts back the other's, and no head is tied from then
# on.
BUILDING = threading.Lock()


def checkpoint_folder(model: str) -> Path:
    """Return the folder of a path, or of a hub id as it is in the hub's cache or comes from the hub.

    Raises RequestError for what is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (ValueError, OSError, HfHubHTTPError) as error:
        raise RequestError(
            f"{model} is no folder, and no model that the hub or its cache gives: {str(error).splitlines()[0]}",
            param="model",
        ) from error


def model_without_values(config: Any, dtype: Any, *, attention: str | None, trust_remote_code: bool) -> Any:
    """Return a model whose parameters were never written to, so that they take no memory; its buffers are right."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else dtype
    how = {"attn_implementation": attention} if attention else {}
    with BUILDING, no_init_weights():
        model = auto_class(config).from_config(
            config, dtype=chosen, trust_remote_code=trust_remote_code, **how
        )
    model.tie_weights()  # which is a part of the initialisation that was left out
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        if any(f".{part}." in f".{name}." for part in kept):
            parameter.data = torch.empty_like(parameter.data, dtype=torch.float32)
    return model


def fill(model: Any, snapshot: Snapshot, folder: Path | None = None, removed: tuple[str, ...] = ()) -> None:
    """Give a model its weights, one after the other, and its folder's generation config.

    Raises BadCheckpointError, BadSnapshotError for weights that are not whole or do not fit.
    """
    names = WeightNames.of(model, removed)
    _, unknown = group_tensors(snapshot.tensors, model, names)
    judge(model, {"unexpected_keys": unknown})
    known = {name: info for name, info in snapshot.tensors.items() if name not in unknown}
    plan = make_plan(known, model, names, partial=True, may_cast=True)
    made_by_itself = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [
        name
        for name in names.infos
        if not plan.group_of.keys() & names.twins(name) and not any(p.search(name) for p in made_by_itself)
    ]
    judge(model, {"missing_keys": missing})
    parameters, filled = model.state_dict(keep_vars=True), set[int]()
    for group in plan.groups:
        for name, value in group.make(snapshot.read, model).items():
            parameter, value = parameters[name], value.to(parameters[name].dtype)
            if id(parameter) in filled and not torch.equal(parameter.data, value):
                # as transformers does: two that differ are not tied, whatever the config says
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
                continue
            parameter.data = value
            filled.add(id(parameter))
    if folder is None:
        return
    with suppress(OSError):  # it need not have one
        model.generation_config = GenerationConfig.from_pretrained(folder)


# --- models that see or hear ---------------------------------------------------------------------------------


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes a model of a type: of text, or where there is none, with pictures."""
    kind = config.model_type
    has_text = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not has_text:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def has_more_than_text(config: Any) -> bool:
    """Return whether a config describes parts beside a text decoder: towers for pictures or sound."""
    return config.get_text_config(decoder=True) is not config and not getattr(
        config, "is_encoder_decoder", False
    )


def keep_text_alone(model: Any) -> tuple[str, ...]:
    """Take a model's towers and projectors out, which no text comes by; return the prefixes of their names."""
    decoder = model.get_decoder()
    paths = {id(module): path for path, module in model.named_modules()}
    way = paths.get(id(decoder))
    if decoder is None or not way:
        return ()
    removed = list(_beside(model, way))
    for path in removed:
        owner, _, last = path.rpartition(".")
        delattr(model.get_submodule(owner), last)
    return tuple(f"{path}." for path in removed)


def names_of_towers(config: Any) -> tuple[str, ...]:
    """Return the prefixes of what a checkpoint has beside its text, where the text is a model of its own (Llama 4)."""
    kind = config.model_type
    if not has_more_than_text(config) or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return ()
    build: Any = AutoModelForImageTextToText.from_config
    with BUILDING, torch.device("meta"), no_init_weights():
        return keep_text_alone(build(config))


def _beside(model: nn.Module, way: str) -> Iterable[str]:
    """Yield the modules that stand beside those on the way to the decoder, but for the output layer."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    parts = way.split(".")
    for depth in range(len(parts)):
        owner = ".".join(parts[:depth])
        for name, child in model.get_submodule(owner).named_children():
            holds_head = any(module is head for module in child.modules())
            if name != parts[depth] and not holds_head:
                yield f"{owner}.{name}" if owner else name
