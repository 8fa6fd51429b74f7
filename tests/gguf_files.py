"""GGUF files as llama.cpp's converter writes them, from folders of transformers' format, by the package `gguf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

__all__ = ["add_tensor", "add_tokenizer", "close", "decoded", "type_of", "write_gguf"]

Kind = gguf.GGMLQuantizationType
_ARCHITECTURES = {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}


def write_gguf(model: Path, out: Path, kind: Kind, extra: dict[str, Any] | None = None) -> Path:
    """Write a model; matrices in `kind`, where their rows are whole blocks, and the rest in float32."""
    config = AutoConfig.from_pretrained(model)
    name = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(out, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if name not in ("qwen2", "granite"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for key, value in (extra or {}).items():
        writer.add_key_value(f"{name}.{key}", value, type_of(value))
    add_tokenizer(writer, model)
    for key, values in _tensors(model, config, name).items():
        add_tensor(writer, key, values, kind)
    close(writer)
    return out


def close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decoded(weight: Tensor, kind: Kind) -> Tensor:
    """Return the values that a matrix has when it was written in `kind`."""
    if weight.dim() < 2 or weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return weight
    values = weight.float().numpy()
    if kind.name == "F32":
        return weight
    if kind.name == "F16":
        return torch.from_numpy(values.astype(np.float16).astype(np.float32))
    return torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind).reshape(values.shape))


def type_of(value: Any) -> Any:
    kinds = {str: "STRING", float: "FLOAT32", int: "UINT32", bool: "BOOL"}
    return gguf.GGUFValueType[kinds[type(value)]]


def add_tokenizer(writer: Any, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: Path, config: Any, name: str) -> dict[str, Tensor]:
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    written: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in load_file(model / "model.safetensors").items():
        stem, _, suffix = key.rpartition(".")
        parts = stem.split(".")
        if "experts" in parts:
            layer, number, part = parts[2], int(parts[5]), parts[6].removesuffix("_proj")
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", {})[number] = tensor
            continue
        if name in ("llama", "granite") and parts[-1] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-1] == "q_proj" else config.num_key_value_heads
            # rows [head, half, n] -> [head, n, half]: pairs that RoPE turns lie side by side
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        if name == "gemma3" and stem.endswith("norm"):
            tensor = tensor.float() + 1
        written[f"{table.get_name(stem)}.{suffix}"] = tensor.contiguous()
    return written | {
        key: torch.stack([of_layer[i] for i in sorted(of_layer)]) for key, of_layer in experts.items()
    }


def add_tensor(writer: Any, key: str, tensor: Tensor, kind: Kind) -> None:
    values = tensor.float().numpy()
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if values.ndim < 2 or values.shape[-1] % block or kind.name == "F32":
        writer.add_tensor(key, values)
    elif kind.name == "F16":
        writer.add_tensor(key, values.astype(np.float16))
    else:
        writer.add_tensor(key, gguf.quantize(values, kind), raw_dtype=kind)
