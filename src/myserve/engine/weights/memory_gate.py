"""Before a byte of a model is loaded, its need is compared with what there is; one that does not fit is refused.

Weights are counted from the names and shapes of the checkpoint in the types that they are served in, the cache for one
context, and what a step computes with. It is an estimate from below: what it refuses would not have run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from myserve.engine.config import EngineConfig
from myserve.engine.memory.device import free_memory
from myserve.engine.memory.prefault import checkpoint_files
from myserve.engine.weights.formats.decoded import DecodedSnapshot
from myserve.engine.weights.snapshot import FolderSnapshot, Snapshot, TensorInfo
from myserve.errors import BadSnapshotError, NotEnoughMemoryError, UnsupportedModelError

__all__ = ["Need", "need_of", "refuse_what_does_not_fit", "stored_tensors"]

LEAST_CONTEXT = 2048  # tokens of the cache, where nobody says how long contexts may be
_LOOKED_UP = re.compile(r"(embed|\bwte\b|\bwpe\b|token_embd)")
_OF_TOWERS = re.compile(r"(visi|visual|image|audio|tower|projector|merger)")
# Layers as configs call them. Where a config says nothing of its layers, each is what the model's kind has (Falcon-H1's
# both attend and hold a state).
_WITHOUT_KEYS = {"linear_attention", "mamba", "conv", "moe", "mlp"}
_WITH_STATE = {"", "linear_attention", "mamba", "hybrid"}
_STATES_OF_A_REQUEST = 2  # one that a step reads, and one that it writes
_STATE_SIZES = (
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ("linear_num_heads", "linear_head_dim", "linear_head_dim"),
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
    ("n_mamba_heads", "mamba_headdim", "mamba_d_state"),
    ("state_size", "num_heads", "head_dim"),
    ("hidden_size", "mamba_expand", "mamba_d_state"),
    ("intermediate_size", "state_size"),
)
_LEAST_CACHE = 16 << 20
_LEAST_CONTEXT_OFFERED = 256
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a model takes: its weights as they are served, the smallest useful cache, a step's own numbers."""

    weights: int
    cache: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.step

    def __str__(self) -> str:
        return (
            f"{_size(self.total)} ({_size(self.weights)} of weights, {_size(self.cache)} of KV cache, "
            f"{_size(self.step)} to compute with)"
        )


def need_of(
    tensors: Mapping[str, TensorInfo],
    text: Any,
    config: EngineConfig,
    *,
    dtype: torch.dtype | None,
    quantize: str,
    is_decoded: bool,
    packs: bool,
) -> Need:
    """Return what a model needs whose checkpoint has these tensors; `text` is the config of its text.

    `dtype`: of its weights; None: each keeps its own. `is_decoded`: they are written to memory before they are packed.
    `packs`: products have copies of their own, so that a tied embedding stands twice.
    """
    plain = sum(_bytes(info, dtype) for info in tensors.values())
    weights = plain
    if quantize == "int8":
        weights = sum(
            _bytes(info, dtype) if _is_kept(name, info) else _int8(info) for name, info in tensors.items()
        )
        # decoded weights lie in memory whole before the first of them is packed
        weights = max(weights, plain) if is_decoded else weights
    if packs and getattr(text, "tie_word_embeddings", False):
        embedding = next((info for name, info in tensors.items() if _LOOKED_UP.search(name)), None)
        if embedding is not None:
            weights += _int8(embedding) if quantize == "int8" else _bytes(embedding, dtype)
    number = _itemsize(dtype, tensors)
    longest = config.max_model_len or min(LEAST_CONTEXT, _context(text))
    states = _STATES_OF_A_REQUEST * 4 * _numbers_of_states(text)  # float32
    cache = config.kv_cache_bytes or longest * _numbers_per_token(text) * number + states
    hidden, vocabulary = int(text.hidden_size), int(text.vocab_size)
    inner = max(_inner(layer, hidden) for layer in _layers(text))
    rows = min(config.max_num_batched_tokens, longest)
    step = rows * (4 * hidden + 2 * inner) * number + config.most_seqs * vocabulary * number
    return Need(weights, cache, step)


def stored_tensors(
    model: str, described: Mapping[str, Any] | None, *, text_alone: bool
) -> Mapping[str, TensorInfo]:
    """Return what the headers of a checkpoint's safetensors say: of a folder, or of the hub's cache.

    `described`: how they are quantised; then their shapes are those of the weights that they stand for. `text_alone`:
    towers are left out. Empty where there are none, or where they are torn: the loader says so.
    """
    files = checkpoint_files(model)
    if not files:
        return {}
    try:
        stored: Snapshot = FolderSnapshot(files[0].parent)
        try:
            tensors = (DecodedSnapshot(stored, described, torch.bfloat16) if described else stored).tensors
        finally:
            stored.close()
    except (BadSnapshotError, UnsupportedModelError):
        return {}
    return {name: info for name, info in tensors.items() if not (text_alone and _OF_TOWERS.search(name))}


def refuse_what_does_not_fit(
    model: str,
    hf_config: Any,
    config: EngineConfig,
    device: torch.device,
    dtype: Any,
    tensors: Mapping[str, TensorInfo],
    *,
    in_hand: int,
    is_int8: bool,
    is_decoded: bool,
) -> None:
    """Raise NotEnoughMemoryError, with both figures and what would fit, for a model that does not. `in_hand`: bytes."""
    if not tensors:
        return
    text = hf_config.get_text_config(decoder=True)
    named = getattr(hf_config, "dtype", None) or getattr(text, "dtype", None)
    served = named if dtype == "auto" else dtype
    on_cpu = device.type == "cpu" and config.exact == "on"
    need = partial(need_of, tensors, text, config, is_decoded=is_decoded, packs=on_cpu)
    now = need(dtype=served, quantize="off" if is_int8 else config.quantize)
    free = free_memory(device) + in_hand
    if now.total <= free:
        return
    int8 = (
        need(dtype=served, quantize="int8") if on_cpu and config.quantize == "off" and not is_int8 else None
    )
    is_wide = served is None or served.itemsize > 2
    half = need(dtype=torch.bfloat16, quantize=config.quantize) if is_wide and not is_int8 else None
    fitting = [
        f"{option} needs {_size(other.total)}"
        for option, other in _smaller(config, now, free, int8, half)
        if other.total <= free
    ]
    what = (
        " and ".join(fitting) if fitting else "no option makes it fit: a smaller model does, or more memory"
    )
    raise NotEnoughMemoryError(
        f"{model} does not fit into memory: it needs {now}, and {_size(free)} are free; {what}"
    )


def _smaller(
    config: EngineConfig, need: Need, free: int, int8: Need | None, half: Need | None
) -> Iterator[tuple[str, Need]]:
    """Yield the options by which a model needs less: another type, a shorter context, both."""
    for option, other in (("--dtype bfloat16", half), ("--quantize int8", int8)):
        if other is not None:
            yield option, other
    for option, base in (("", need), ("--quantize int8 ", int8), ("--dtype bfloat16 ", half)):
        if base is None or base.total <= free:
            continue
        room = free - base.weights - base.step
        if config.kv_cache_bytes is not None and room >= _LEAST_CACHE:
            mebibytes = room >> 20
            yield f"{option}--kv-cache-bytes {mebibytes}MiB", replace(base, cache=mebibytes << 20)
        elif config.kv_cache_bytes is None and config.max_model_len is not None:
            tokens = room * config.max_model_len // base.cache // 64 * 64
            if tokens >= _LEAST_CONTEXT_OFFERED:
                cache = base.cache * tokens // config.max_model_len
                yield f"{option}--max-model-len {tokens}", replace(base, cache=cache)


def _bytes(info: TensorInfo, dtype: torch.dtype | None) -> int:
    is_cast = dtype is not None and info.dtype.is_floating_point
    return math.prod(info.shape) * (dtype.itemsize if is_cast and dtype is not None else info.dtype.itemsize)


def _itemsize(dtype: torch.dtype | None, tensors: Mapping[str, TensorInfo]) -> int:
    if dtype is not None:
        return dtype.itemsize
    return max((info.dtype.itemsize for info in tensors.values() if len(info.shape) > 1), default=4)


def _is_kept(name: str, info: TensorInfo) -> bool:
    """Return whether int8 leaves a weight as it is: lookups, vectors, and routers, which are small."""
    return len(info.shape) < 2 or bool(_LOOKED_UP.search(name)) or not info.dtype.is_floating_point


def _int8(info: TensorInfo) -> int:
    rows = math.prod(info.shape[:-1])
    return math.prod(info.shape) + 4 * rows


def _inner(layer: Any, hidden: int) -> int:
    width = getattr(layer, "intermediate_size", None) or 4 * hidden
    return (
        int(max(width)) if isinstance(width, list | tuple) else int(width)
    )  # Gemma 3n has one for each layer


def _numbers_per_token(text: Any) -> int:
    """Return how many numbers of keys and values a token has in all layers that attend."""
    layers = zip(_layers(text), _kinds(text), strict=False)
    return sum(_numbers_per_token_of(layer) for layer, kind in layers if kind not in _WITHOUT_KEYS)


def _numbers_per_token_of(layer: Any) -> int:
    if not getattr(layer, "num_attention_heads", None):  # a model that is all states
        return 0
    heads = int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
    width = int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
    if rank := getattr(layer, "qk_nope_head_dim", None):  # MLA: keys of every head, with their part of RoPE
        heads, width = int(layer.num_attention_heads), int(rank) + int(layer.qk_rope_head_dim)
    return 2 * heads * width


def _numbers_of_states(text: Any) -> int:
    """Return how many numbers the recurrent states of one request have; those of convolutions, few, are not counted."""
    size = next((size for names in _STATE_SIZES if (size := _product(text, names))), 0)
    if hasattr(text, "linear_attn_alpha_factor"):  # lightning attention's, whose heads are those of attention
        heads = int(text.num_attention_heads)
        size = heads * int(getattr(text, "head_dim", None) or text.hidden_size // heads) ** 2
    return size * sum(kind in _WITH_STATE for kind in _kinds(text))


def _product(text: Any, names: Sequence[str]) -> int:
    """Return the product of sizes; 0 where one is missing, behind which none is asked for: Gemma 4's may raise."""
    product = 1
    for name in names:
        if not isinstance(size := getattr(text, name, None), int):
            return 0
        product *= size
    return product


def _kinds(text: Any) -> list[str]:
    """Return what each layer is, as configs call it; "" where nothing is said of layers."""
    named = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    return list(named) if named else [""] * int(text.num_hidden_layers)


def _layers(text: Any) -> list[Any]:
    """Return the config of each layer: its own where layers differ, as Gemma 4's do, and the model's where not."""
    own = getattr(text, "per_layer_config", None)
    return list(own) if own else [text] * int(text.num_hidden_layers)


def _context(text: Any) -> int:
    return int(getattr(text, "max_position_embeddings", None) or LEAST_CONTEXT)


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count >> 20} MiB"
