"""A model from a GGUF file: its config from the metadata, its weights under transformers' names, its tokenizer.

Each architecture has a table of what its metadata become. A key or a tensor that no table has is refused by name: a
scale of attention or a window that were passed over would serve other numbers. llama.cpp stores Llama's queries and
keys with the halves of each head interleaved, and Gemma's norms with 1 added; both are undone here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from myserve.engine.weights.formats.gguf_file import GgufFile, need_gguf
from myserve.engine.weights.snapshot import TensorInfo
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = ["GgufSnapshot", "gguf_config", "gguf_tokenizer", "scale_frequencies"]

_NAMES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
_MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Read by name below, or of no effect on what is computed.
_READ = {
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "vocab_size",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "attention.value_length",
}  # fmt: skip
_PLAIN_SPLITS = ("default", "gpt-2", "gpt2")
_NEEDED = ("context_length", "block_count", "embedding_length", "attention.head_count")
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_EXPERTS = re.compile(r"^(blk\.\d+)\.ffn_(gate|up|down)_exps\.weight$")


@dataclass(frozen=True, slots=True)
class _Architecture:
    """Counterpart of a GGUF architecture in transformers."""

    model_type: str
    names: Mapping[str, str] = field(default_factory=lambda: _NAMES)
    always: Mapping[str, Any] = field(default_factory=dict)
    has_interleaved_heads: bool = False
    adds_one_to_norms: bool = False


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("llama", has_interleaved_heads=True),
    "qwen2": _Architecture("qwen2", always={"use_sliding_window": False}),
    "qwen3": _Architecture("qwen3", always={"use_sliding_window": False}),
    "qwen3moe": _Architecture(
        "qwen3_moe",
        _NAMES | _MOE,
        {
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        },
    ),
    "gemma3": _Architecture(
        "gemma3_text",
        _NAMES | {"attention.sliding_window": "sliding_window"},
        adds_one_to_norms=True,
    ),
}


def _architecture(file: GgufFile) -> tuple[str, _Architecture]:
    name = str(file.metadata.get("general.architecture"))
    if name not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path.name} is of the architecture {name}; {', '.join(_ARCHITECTURES)} are read from GGUF: take the "
            "model's safetensors"
        )
    return name, _ARCHITECTURES[name]


def gguf_config(file: GgufFile) -> Any:
    """Return transformers' config of a file. Raises UnsupportedModelError for what it has and we do not read."""
    name, architecture = _architecture(file)
    told = {k.removeprefix(f"{name}."): v for k, v in file.metadata.items() if k.startswith(f"{name}.")}
    if strange := sorted(told.keys() - architecture.names.keys() - _READ):
        raise UnsupportedModelError(
            f"{file.path.name} has {name}.{strange[0]}, which is not read from GGUF, and the model may need it: take "
            "the model's safetensors"
        )
    if missing := [key for key in _NEEDED if key not in told]:
        raise BadCheckpointError(f"{file.path.name} has no {name}.{missing[0]} in its metadata")
    if strange := [
        key for key in told.keys() & architecture.names.keys() if not isinstance(told[key], int | float)
    ]:
        raise UnsupportedModelError(
            f"{file.path.name} has {name}.{strange[0]} of {type(told[strange[0]]).__name__}, and is read "
            "where it is one number for all layers: take the model's safetensors"
        )
    _refuse_absurd(file, name, told)
    values = {architecture.names[key]: told[key] for key in told.keys() & architecture.names.keys()}
    heads = values.setdefault("num_key_value_heads", values["num_attention_heads"])
    width = values.setdefault("head_dim", values["hidden_size"] // max(1, values["num_attention_heads"]))
    for key in ("rope.dimension_count", "attention.value_length"):
        if told.get(key, width) != width:
            raise UnsupportedModelError(
                f"{file.path.name} has {name}.{key} {told[key]} and heads of {width}, which is not read from "
                "GGUF: take the model's safetensors"
            )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or min(heads, width) < 1:
        raise BadCheckpointError(f"{file.path.name} has no tokens, or no heads, in its metadata")
    if "output.weight" not in file.tensors:
        values["tie_word_embeddings"] = True
    else:
        values["tie_word_embeddings"] = False
    values |= {"vocab_size": len(tokens), "rope_parameters": _rope(file, name, told), **_special(file)}
    if architecture.model_type == "gemma3_text":
        values |= _gemma3(values, told)
    if architecture.model_type == "qwen2":
        del values["head_dim"]
    try:
        return AutoConfig.for_model(architecture.model_type, **architecture.always, **values)
    except Exception as error:  # of many kinds: transformers checks values by several libraries
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpointError(
            f"the metadata of {file.path.name} are no config of {name}: {reason}"
        ) from error


def _refuse_absurd(file: GgufFile, name: str, told: Mapping[str, Any]) -> None:
    """Raise BadCheckpointError for numbers that are none, and for other blocks than there are tensors of."""
    for key, value in told.items():
        if isinstance(value, float) and not (math.isfinite(value) and value > 0):
            raise BadCheckpointError(f"{file.path.name} says {name}.{key} is {value}")
    blocks = {found[1] for tensor in file.tensors if (found := _BLOCK.match(tensor))}
    if len(blocks) != told["block_count"]:
        raise BadCheckpointError(
            f"{file.path.name} says {name}.block_count is {told['block_count']}, and has tensors of {len(blocks)} "
            "blocks"
        )


def _rope(file: GgufFile, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    base = {"rope_type": "default", "rope_theta": float(told.get("rope.freq_base", 10000.0))}
    kind = told.get("rope.scaling.type", "none")
    if kind == "none":
        return base
    if kind not in ("linear", "yarn") or "rope.scaling.factor" not in told:
        raise UnsupportedModelError(
            f"{file.path.name} scales RoPE by {kind!r}, and linear and yarn are read from GGUF: take the model's "
            "safetensors"
        )
    base |= {"rope_type": kind, "factor": float(told["rope.scaling.factor"])}
    if kind == "yarn":
        if "rope.scaling.original_context_length" not in told:
            raise BadCheckpointError(f"{file.path.name} has no {name}.rope.scaling.original_context_length")
        base["original_max_position_embeddings"] = told["rope.scaling.original_context_length"]
    return base


def _gemma3(values: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp knows of Gemma 3 without the file's saying so."""
    # the largest scales queries by the width of a model's share of heads, all others by the width of a head
    largest = values["num_hidden_layers"] == 62
    scalar = values["hidden_size"] // values["num_attention_heads"] if largest else values["head_dim"]
    layers = range(values["num_hidden_layers"])
    return {
        "query_pre_attn_scalar": scalar,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in layers],
        "rope_parameters": {
            "full_attention": values["rope_parameters"]
            | {"rope_theta": float(told.get("rope.freq_base", 1e6))},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


def _special(file: GgufFile) -> dict[str, Any]:
    """Every id that ends a completion: the end of the text, of a turn, of a message."""
    ids = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return {
        "eos_token_id": list(dict.fromkeys(i for i in ids if i is not None)) or None,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def gguf_tokenizer(file: GgufFile) -> Any:
    """Return transformers' tokenizer of a file, its chat template included. Raises BadCheckpointError."""
    # here, and not above: an older transformers has no such module, and serves all but GGUF
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = file.metadata.get("tokenizer.ggml.pre", "default")
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_PLAIN_SPLITS}
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and split not in known:
        # transformers would cut text as GPT-2 does, and give other tokens than the model was trained on
        raise UnsupportedModelError(
            f"{file.path.name} cuts text before its tokenizer by {split!r}, which is not read from GGUF: take the "
            "model's safetensors"
        )
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # transformers and tokenizers raise what the file makes them
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpointError(
            f"the tokenizer of {file.path.name} cannot be read: {type(error).__name__}: {reason}"
        ) from error
    template = file.metadata.get("tokenizer.chat_template")
    if tokenizer.chat_template is None and isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


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
    """The weights of a file under the names of transformers' model, in `dtype`, as a `Snapshot`."""

    def __init__(self, file: GgufFile, model: Any, dtype: torch.dtype) -> None:
        self._file, self._dtype = file, dtype
        name, self._architecture = _architecture(file)
        self._heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
        self.tensors: dict[str, TensorInfo] = {}
        self._make: dict[str, Callable[[], Tensor]] = {}
        names = _names(name, model)
        for source, tensor in file.tensors.items():
            if found := _EXPERTS.match(source):
                self._add_experts(found[1], found[2], names)
            elif source != _ROPE_FACTORS:
                if source not in names:
                    raise BadCheckpointError(
                        f"the model that its metadata describe has no place for {source}"
                    )
                self._add(names[source], tensor.shape, partial(self._plain, source))

    def read(self, name: str) -> Tensor:
        return self._make[name]().to(self._dtype)

    def close(self) -> None:
        """The file is mapped, and closed with the last that reads it."""

    def _add(self, name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        self.tensors[name] = TensorInfo(self._dtype, shape)
        self._make[name] = make

    def _plain(self, source: str) -> Tensor:
        values = torch.from_numpy(self._file.read(source)).float()
        if self._architecture.adds_one_to_norms and source.endswith("norm.weight"):
            return values - 1
        if self._architecture.has_interleaved_heads and (part := re.search(r"\.attn_([qk])\.", source)):
            heads = self._heads[part[1] == "k"]
            if values.shape[0] % (2 * heads):
                raise BadCheckpointError(f"{source} has {values.shape[0]} rows, which are no {heads} heads")
            halves = values.reshape(heads, -1, 2, *values.shape[1:])
            return halves.transpose(1, 2).reshape(values.shape)
        return values

    def _add_experts(self, layer: str, part: str, names: Mapping[str, str]) -> None:
        """Gate and up are one tensor of the model, and two of the file."""
        gate, up, down = (f"{layer}.ffn_{which}_exps.weight" for which in ("gate", "up", "down"))
        tensors = self._file.tensors
        sources = (down,) if part == "down" else (gate, up)
        target = names.get(down if part == "down" else gate)
        if target is None or any(source not in tensors for source in sources):
            raise BadCheckpointError(f"{layer} has not all of its experts, or the model has none there")
        shapes = [tensors[source].shape for source in sources]
        if any(len(shape) != 3 or shape != shapes[0] for shape in shapes):
            raise BadCheckpointError(
                f"the experts of {layer} have the shapes {shapes}, which do not fit each other"
            )
        experts, rows, columns = shapes[0]
        self._add(target, (experts, rows * len(sources), columns), partial(self._joined, sources))

    def _joined(self, sources: tuple[str, ...]) -> Tensor:
        parts = [torch.from_numpy(self._file.read(source)).to(self._dtype) for source in sources]
        return torch.cat(parts, dim=1)


def _names(architecture: str, model: Any) -> dict[str, str]:
    """Return transformers' name of each tensor that a file of this model may have, by llama.cpp's own table."""
    gguf = need_gguf()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found: dict[str, str] = {}
    for name in model.state_dict():
        stem, dot, suffix = name.rpartition(".")
        if suffix in ("weight", "bias"):
            written, ending = table.get_name(stem), dot + suffix
        else:  # experts, stacked: their parameters have no module of their own
            written, ending = table.get_name(name.replace("gate_up_proj", "gate_proj")), ".weight"
        if written is not None:
            found[written + ending] = name
    return found
