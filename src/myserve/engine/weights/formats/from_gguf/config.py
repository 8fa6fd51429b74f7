"""The config of a GGUF file, from its metadata by its architecture's table; what no table has is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from myserve.engine.weights.formats.from_gguf.architectures import DENSE, Architecture, Told
from myserve.engine.weights.formats.from_gguf.file import GgufFile
from myserve.engine.weights.formats.from_gguf.hybrids import HYBRIDS
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = ["ARCHITECTURES", "architecture_of", "gguf_config"]

ARCHITECTURES: Mapping[str, Architecture] = {**DENSE, **HYBRIDS}
_NEEDED = ("block_count", "embedding_length")
_NEEDED_TO_ATTEND = ("context_length", "attention.head_count")
_BLOCK = re.compile(r"^blk\.(\d+)\.")


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    """Return the name of a file's architecture, and its tables. Raises UnsupportedModelError where we have none."""
    name = str(file.metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path.name} is of the architecture {name}; {', '.join(ARCHITECTURES)} are read from GGUF: take the "
            "model's safetensors"
        )
    return name, ARCHITECTURES[name]


def gguf_config(file: GgufFile) -> Any:
    """Return transformers' config of a file. Raises UnsupportedModelError for what it has and we do not read."""
    name, architecture = architecture_of(file)
    told = Told.of(file, name)
    _refuse_unread(told, architecture)
    _refuse_absurd(told)
    values = {architecture.names[key]: value for key, value in _numbers(told, architecture).items()}
    if architecture.attends:
        _add_attention(told, architecture, values)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise BadCheckpointError(f"{file.path.name} has no tokens in its metadata")
    values |= {"vocab_size": len(tokens), "tie_word_embeddings": "output.weight" not in file.tensors}
    values |= _special(file)
    values |= architecture.more(told, values)
    if not architecture.names_head_dim:
        values.pop("head_dim", None)
    try:
        return AutoConfig.for_model(architecture.model_type, **architecture.always, **values)
    except Exception as error:  # of many kinds: transformers checks values by several libraries
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpointError(
            f"the metadata of {file.path.name} are no config of {name}: {reason}"
        ) from error


def _refuse_unread(told: Told, architecture: Architecture) -> None:
    if strange := sorted(told.values.keys() - architecture.names.keys() - architecture.read):
        raise UnsupportedModelError(
            f"{told.file} has {told.name}.{strange[0]}, which is not read from GGUF, and the model may need it: take "
            "the model's safetensors"
        )
    needed = (*_NEEDED, *(_NEEDED_TO_ATTEND if architecture.attends else ()), *architecture.needed)
    if missing := [key for key in needed if key not in told.values]:
        raise BadCheckpointError(f"{told.file} has no {told.name}.{missing[0]} in its metadata")


def _numbers(told: Told, architecture: Architecture) -> dict[str, int | float]:
    """Return the numbers of a config's names; of a list, 0 for layers without one, that of the others."""
    numbers: dict[str, int | float] = {}
    for key in told.values.keys() & architecture.names.keys():
        value = told.values[key]
        if key in architecture.per_layer and isinstance(value, list):
            others = {number for number in value if number != 0}
            if not others:
                continue
            value = others.pop() if len(others) == 1 else value
        if not isinstance(value, int | float):
            raise UnsupportedModelError(
                f"{told.file} has {told.name}.{key} of {type(value).__name__}, and is read where it is one number for "
                "all layers: take the model's safetensors"
            )
        numbers[key] = value
    return numbers


def _refuse_absurd(told: Told) -> None:
    """Raise BadCheckpointError for numbers that are none, and for other blocks than there are tensors of."""
    for key, value in told.values.items():
        if isinstance(value, float) and not (math.isfinite(value) and value > 0):
            raise BadCheckpointError(f"{told.file} says {told.name}.{key} is {value}")
    blocks = {found[1] for tensor in told.tensors if (found := _BLOCK.match(tensor))}
    if len(blocks) != told.values["block_count"]:
        raise BadCheckpointError(
            f"{told.file} says {told.name}.block_count is {told.values['block_count']}, and has tensors of "
            f"{len(blocks)} blocks"
        )


def _add_attention(told: Told, architecture: Architecture, values: dict[str, Any]) -> None:
    """Add heads, their width and RoPE to a config's values."""
    heads = values.setdefault("num_key_value_heads", values["num_attention_heads"])
    width = values.setdefault("head_dim", values["hidden_size"] // max(1, values["num_attention_heads"]))
    if min(heads, width) < 1:
        raise BadCheckpointError(f"{told.file} has no heads in its metadata")
    turned = told.values.get("rope.dimension_count", width)
    is_served = {
        "whole": turned == width,
        "part": isinstance(turned, int) and 0 < turned <= width,
        "none": True,  # where RoPE turns nothing, files have any number
    }[architecture.rope]
    for key, is_right in (
        ("rope.dimension_count", is_served),
        ("attention.value_length", told.values.get("attention.value_length", width) == width),
    ):
        if not is_right:
            raise UnsupportedModelError(
                f"{told.file} has {told.name}.{key} {told.values[key]} and heads of {width}, which is not read from "
                "GGUF: take the model's safetensors"
            )
    values["rope_parameters"] = _rope(told)


def _rope(told: Told) -> dict[str, Any]:
    base = {"rope_type": "default", "rope_theta": float(told.values.get("rope.freq_base", 10000.0))}
    kind = told.values.get("rope.scaling.type", "none")
    if kind == "none":
        return base
    if kind not in ("linear", "yarn") or "rope.scaling.factor" not in told.values:
        raise UnsupportedModelError(
            f"{told.file} scales RoPE by {kind!r}, and linear and yarn are read from GGUF: take the model's "
            "safetensors"
        )
    base |= {"rope_type": kind, "factor": float(told.values["rope.scaling.factor"])}
    if kind == "yarn":
        if "rope.scaling.original_context_length" not in told.values:
            raise BadCheckpointError(f"{told.file} has no {told.name}.rope.scaling.original_context_length")
        base["original_max_position_embeddings"] = told.values["rope.scaling.original_context_length"]
    return base


def _special(file: GgufFile) -> dict[str, Any]:
    """Every id that ends a completion: the end of the text, of a turn, of a message."""
    ids = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return {
        "eos_token_id": list(dict.fromkeys(i for i in ids if i is not None)) or None,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
