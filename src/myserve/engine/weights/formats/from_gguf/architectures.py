"""The architectures that are read from GGUF: what each key of their metadata and each of their tensors becomes.

A key or a tensor that no table has is refused by name: a scale of attention or a window that were passed over would
serve other numbers. Hybrids have their tables in `hybrids.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from myserve.engine.weights.formats.from_gguf.file import GgufFile, GgufTensor
from myserve.engine.weights.formats.from_gguf.undo import Undo, halves_of_heads, minus_one, stacked
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = [
    "ATTENDING",
    "DENSE",
    "EXPERTS",
    "GRANITE",
    "MOE",
    "ROPE_KEYS",
    "Architecture",
    "Parts",
    "Told",
    "nothing_more",
]

_BLOCK = re.compile(r"^blk\.(\d+)\.(.*)$")


@dataclass(frozen=True, slots=True)
class Told:
    """Metadata of a file about its own architecture, by key, and the tensors that it has."""

    file: str
    name: str
    values: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def of(cls, file: GgufFile, name: str) -> Told:
        own = {k.removeprefix(f"{name}."): v for k, v in file.metadata.items() if k.startswith(f"{name}.")}
        # written from a decimal, of which float32 has kept the first digits alone: 1e-6, not 9.99999997e-07
        own = {key: _decimal(value) if isinstance(value, float) else value for key, value in own.items()}
        return cls(file.path.name, name, own, file.tensors)

    def size(self, key: str) -> int:
        """Return a number above 0. Raises BadCheckpointError where there is none."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadCheckpointError(f"{self.file} says {self.name}.{key} is {value}, and it is a size")
        return value

    def share(self, key: str, of: str) -> int:
        """Return a size divided by another. Raises BadCheckpointError where that is no whole number."""
        whole, part = self.size(key), self.size(of)
        if whole % part:
            raise BadCheckpointError(
                f"{self.file} says {self.name}.{key} is {whole}, which {of} {part} do not divide"
            )
        return whole // part

    def has(self, tensor: str, block: int | None = None) -> bool:
        """Return whether a block has a tensor, or whether any has."""
        if block is not None:
            return f"blk.{block}.{tensor}" in self.tensors
        return any(found and found[2] == tensor for found in map(_BLOCK.match, self.tensors))

    def kinds(self, layers: int, by_tensor: Mapping[str, str]) -> list[str]:
        """Return what each layer is, by the first of these tensors that it has. Raises BadCheckpointError for none."""
        found = [
            next((kind for tensor, kind in by_tensor.items() if self.has(tensor, i)), "")
            for i in range(layers)
        ]
        if "" in found:
            raise BadCheckpointError(f"blk.{found.index('')} of {self.file} is no layer of {self.name}")
        return found

    def refuse_other(self, key: str, expected: Sequence[object]) -> None:
        """Raise BadCheckpointError where a list of the metadata is not what the tensors say."""
        if key in self.values and self.values[key] != expected:
            raise BadCheckpointError(
                f"{self.file} says {self.name}.{key} of other layers than it has tensors of"
            )

    def refuse_value(self, key: str, served: object) -> None:
        """Raise UnsupportedModelError for another value of a key than the one that is served."""
        if self.values.get(key, served) != served:
            raise UnsupportedModelError(
                f"{self.file} says {self.name}.{key} is {self.values[key]}, and {served} is read from GGUF: take the "
                "model's safetensors"
            )


def _decimal(value: float) -> float:
    """Return the shortest decimal that is this number in float32."""
    return float(str(np.float32(value))) if math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Parts:
    """Tensors of a file that are one weight of the model, and how they are joined."""

    names: tuple[str, ...]  # in a table without the blk.N. before them
    join: Callable[[Sequence[Tensor], Any], Tensor] = stacked


def nothing_more(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return no further values of a config."""
    return {}


ATTENDING = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
# Read by name, or of no effect on what is computed.
ROPE_KEYS = frozenset({
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "vocab_size",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "attention.value_length",
})  # fmt: skip
# An ending of transformers' names -> what it is made of; of several, the one that a file has.
EXPERTS: dict[str, tuple[Parts, ...]] = {
    ".experts.gate_up_proj": (
        Parts(("ffn_gate_exps.weight", "ffn_up_exps.weight")),
        Parts(("ffn_gate_up_exps.weight",)),
    ),
    ".experts.up_proj": (Parts(("ffn_up_exps.weight",)),),
    ".experts.down_proj": (Parts(("ffn_down_exps.weight",)),),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """Counterpart of a GGUF architecture in transformers."""

    model_type: str
    names: Mapping[str, str] = field(default_factory=lambda: ATTENDING)  # of the metadata -> of the config
    always: Mapping[str, Any] = field(default_factory=dict)
    read: frozenset[str] = ROPE_KEYS  # keys beside `names` that are read, or of no effect
    per_layer: frozenset[str] = (
        frozenset()
    )  # keys of `names` that may have a number for each layer, 0 where it has none
    more: Callable[[Told, Mapping[str, Any]], dict[str, Any]] = nothing_more
    needed: tuple[str, ...] = ()  # keys without which transformers and llama.cpp compute other things
    attends: bool = True
    names_head_dim: bool = True  # its config has a name for the width of heads
    rope: Literal["whole", "part", "none"] = "whole"  # how much of a head it turns
    undo: Mapping[str, tuple[Undo, ...]] = field(
        default_factory=dict
    )  # by the name of a tensor behind blk.N.
    parts: Mapping[str, tuple[Parts, ...]] = field(default_factory=lambda: EXPERTS)
    renamed: tuple[tuple[str, str], ...] = ()  # in transformers' names, before llama.cpp's table is asked


_LLAMA = {
    **dict.fromkeys(
        ("attn_q.weight", "attn_q.bias"), (halves_of_heads(lambda config: int(config.num_attention_heads)),)
    ),
    **dict.fromkeys(
        ("attn_k.weight", "attn_k.bias"), (halves_of_heads(lambda config: int(config.num_key_value_heads)),)
    ),
}
_GEMMA = dict.fromkeys(
    (
        *("attn_norm.weight", "attn_q_norm.weight", "attn_k_norm.weight", "post_attention_norm.weight"),
        *("ffn_norm.weight", "post_ffw_norm.weight", "output_norm.weight"),
    ),
    (minus_one,),
)


def _gemma3(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
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
            | {"rope_theta": float(told.values.get("rope.freq_base", 1e6))},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


def _granite(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": told.has("attn_q.bias"), "mlp_bias": told.has("ffn_gate.bias")}


DENSE: Mapping[str, Architecture] = {
    "llama": Architecture("llama", undo=_LLAMA),
    "qwen2": Architecture("qwen2", always={"use_sliding_window": False}, names_head_dim=False),
    "qwen3": Architecture("qwen3", always={"use_sliding_window": False}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        ATTENDING | MOE,
        {
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        },
    ),
    "gemma3": Architecture(
        "gemma3_text",
        ATTENDING | {"attention.sliding_window": "sliding_window"},
        more=_gemma3,
        undo=_GEMMA,
    ),
    "granite": Architecture(
        "granite",
        ATTENDING | GRANITE,
        more=_granite,
        needed=("attention.scale",),
        names_head_dim=False,
        undo=_LLAMA,
    ),
}
