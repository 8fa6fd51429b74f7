"""GGUF files of models with recurrent layers, by what llama.cpp's converter does to each tensor, written anew here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import trained_tokenizer
from gguf_files import add_tensor, add_tokenizer, close, type_of

__all__ = ["HYBRIDS", "make_hybrid", "metadata", "write_hybrid"]

_SMALL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
# three value heads a key head, and widths that differ: another order shows
_DELTA = {
    "linear_num_value_heads": 6, "linear_num_key_heads": 2, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
    "head_dim": 16, "num_hidden_layers": 4,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_SCAN = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 12,
    "mamba_n_groups": 2,
    "num_hidden_layers": 3,
}
_GRANITE = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "shared_intermediate_size": 48,
    "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
}  # fmt: skip
_NEMOTRON = {
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 12, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 24,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 24, "routed_scaling_factor": 2.5,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
}  # fmt: skip
_CONV = {
    "layer_types": ["conv", "full_attention", "conv"],
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
}
_STATES = {
    "hidden_size": 64, "num_hidden_layers": 2, "state_size": 12, "vocab_size": 384, "bos_token_id": 0,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
_STATE = {"A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias"}
# llama.cpp's name -> transformers' type, and its config
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen35": ("qwen3_5_text", _SMALL | _DELTA | {"tie_word_embeddings": True}),
    "qwen35moe": ("qwen3_5_moe_text", _SMALL | _DELTA | _EXPERTS),
    "qwen3next": ("qwen3_next", _SMALL | _DELTA | _EXPERTS),
    "lfm2": ("lfm2", _SMALL | _CONV | {"block_auto_adjust_ff_dim": False}),
    "lfm2moe": ("lfm2_moe", _SMALL | _CONV | {k: v for k, v in _EXPERTS.items() if "shared" not in k}),
    "falcon-h1": ("falcon_h1", _SMALL | _SCAN | {"head_dim": 16, "mamba_d_ssm": 128, "mamba_rms_norm": True}
                  | {"mamba_norm_before_gate": False}),
    "granitehybrid": ("granitemoehybrid", _SMALL | _SCAN | _GRANITE
                      | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron_h_moe": ("nemotron_h", _SMALL | _NEMOTRON),
    "jamba": ("jamba", _SMALL | {"mamba_d_state": 12, "mamba_dt_rank": 5, "num_experts": 4, "num_experts_per_tok": 2}
              | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}),
    "mamba2": ("mamba2", _STATES | {"num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "mamba": ("mamba", _STATES),
}  # fmt: skip


def make_hybrid(name: str, folder: Path) -> Path:
    """Write a tiny model in bfloat16, whose norms, decays and biases are no ones and zeros."""
    kind, change = HYBRIDS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **change)).float()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.bfloat16().save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


def write_hybrid(
    name: str,
    model: Path,
    out: Path,
    kind: Any,
    changes: dict[str, Any] | None = None,
    more: dict[str, Tensor] | None = None,
    without: Collection[str] = (),
) -> Path:
    """Write a folder's model; a change of the metadata to None leaves a key out; `more` tensors, and `without` some."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    writer = gguf.GGUFWriter(out, name)
    for key, value in (metadata(name, loaded.config) | (changes or {})).items():
        if isinstance(value, list):
            writer.add_array(f"{name}.{key}", value)
        elif value is not None:
            writer.add_key_value(f"{name}.{key}", value, type_of(value))
    add_tokenizer(writer, model)
    for key, tensor in (dict(_tensors(name, loaded)) | (more or {})).items():
        if key in without:
            continue
        # in float32, as the converter keeps them: vectors, norms, convolutions, what selects experts
        is_plain = (
            key.endswith("norm.weight") or not key.endswith(".weight") or "conv" in key or "_inp" in key
        )
        add_tensor(writer, key, tensor, gguf.GGMLQuantizationType.F32 if is_plain else kind)
    close(writer)
    return out


# --- metadata ------------------------------------------------------------------------------------------------


def metadata(name: str, c: Any) -> dict[str, Any]:
    """Return what the converter says of a config, by the keys behind the architecture's name."""
    if name.startswith("mamba"):
        return _metadata_of_states(name, c)
    kinds = list(c.layer_types)
    said = {
        "context_length": c.max_position_embeddings, "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "feed_forward_length": c.intermediate_size,
    }  # fmt: skip
    epsilon = next(e for e in ("rms_norm_eps", "norm_eps", "layer_norm_epsilon") if hasattr(c, e))
    said["attention.layer_norm" + ("_epsilon" if "layer" in epsilon else "_rms_epsilon")] = getattr(
        c, epsilon
    )
    if getattr(c, "rope_parameters", None):
        said["rope.freq_base"] = float(c.rope_parameters["rope_theta"])
    if "head_dim" in HYBRIDS[name][1]:
        said |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if name.startswith("qwen"):
        said |= {
            "ssm.conv_kernel": c.linear_conv_kernel_dim, "ssm.state_size": c.linear_key_head_dim,
            "ssm.group_count": c.linear_num_key_heads, "ssm.time_step_rank": c.linear_num_value_heads,
            "ssm.inner_size": c.linear_num_value_heads * c.linear_value_head_dim, "full_attention_interval": 4,
            "attention.recurrent_layers": [kind == "linear_attention" for kind in kinds],
            "rope.dimension_count": int(c.head_dim * c.rope_parameters["partial_rotary_factor"]),
            "rope.dimension_sections": [11, 11, 10, 0],
        }  # fmt: skip
    elif name in ("granitehybrid", "lfm2", "lfm2moe", "nemotron_h_moe", "jamba"):
        heads = [c.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds]
        said |= {"attention.head_count_kv": heads, "vocab_size": c.vocab_size}
    return said | _metadata_of_scans(name, c) | _metadata_of_experts(name, c, kinds)


def _metadata_of_states(name: str, c: Any) -> dict[str, Any]:
    inner = c.expand * c.hidden_size
    more = (
        {"ssm.time_step_rank": inner // c.head_dim, "ssm.group_count": c.n_groups}
        if name == "mamba2"
        else {"ssm.time_step_rank": c.time_step_rank, "ssm.dt_b_c_rms": False}
    )
    return more | {
        "context_length": 2**20, "embedding_length": c.hidden_size, "feed_forward_length": 0,
        "attention.head_count": 0, "block_count": c.num_hidden_layers, "ssm.conv_kernel": c.conv_kernel,
        "ssm.inner_size": inner, "ssm.state_size": c.state_size,
        "attention.layer_norm_rms_epsilon": c.layer_norm_epsilon,
    }  # fmt: skip


def _metadata_of_scans(name: str, c: Any) -> dict[str, Any]:
    if name in ("falcon-h1", "granitehybrid"):
        said = {
            "ssm.conv_kernel": c.mamba_d_conv, "ssm.state_size": c.mamba_d_state, "ssm.group_count": c.mamba_n_groups,
            "ssm.time_step_rank": c.mamba_n_heads, "ssm.inner_size": c.mamba_n_heads * c.mamba_d_head,
        }  # fmt: skip
        if name == "falcon-h1":
            return said
        return said | {
            "attention.scale": c.attention_multiplier, "embedding_scale": float(c.embedding_multiplier),
            "residual_scale": c.residual_multiplier, "logit_scale": float(c.logits_scaling),
            "rope.scaling.finetuned": False, "rope.dimension_count": c.hidden_size // c.num_attention_heads,
            "context_length": 2**20,
        }  # fmt: skip
    if name == "jamba":
        return {
            "ssm.conv_kernel": c.mamba_d_conv, "ssm.state_size": c.mamba_d_state,
            "ssm.inner_size": c.mamba_expand * c.hidden_size, "ssm.time_step_rank": c.mamba_dt_rank,
        }  # fmt: skip
    if name == "nemotron_h_moe":
        return {
            "ssm.conv_kernel": c.conv_kernel, "ssm.state_size": c.ssm_state_size, "ssm.group_count": c.n_groups,
            "ssm.time_step_rank": c.mamba_num_heads, "ssm.inner_size": c.mamba_num_heads * c.mamba_head_dim,
            # of heads as wide as their share: it has others, and turns none
            "rope.dimension_count": c.hidden_size // c.num_attention_heads, "rope.scaling.finetuned": False,
        }  # fmt: skip
    return {"shortconv.l_cache": c.conv_L_cache} if name.startswith("lfm2") else {}


def _metadata_of_experts(name: str, c: Any, kinds: list[str]) -> dict[str, Any]:
    if name in ("qwen35moe", "qwen3next", "lfm2moe"):
        said = {
            "expert_count": c.num_experts, "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": c.moe_intermediate_size,
        }  # fmt: skip
        if name == "lfm2moe":
            return said | {"leading_dense_block_count": c.num_dense_layers, "expert_gating_func": 2}
        return said | {"expert_shared_feed_forward_length": c.shared_expert_intermediate_size}
    if name == "jamba":
        return {"expert_count": c.num_experts, "expert_used_count": c.num_experts_per_tok}
    if name == "granitehybrid":
        return {
            "expert_count": c.num_local_experts, "expert_used_count": c.num_experts_per_tok,
            "expert_shared_feed_forward_length": c.shared_intermediate_size,
        }  # fmt: skip
    if name == "nemotron_h_moe":
        return {
            "feed_forward_length": [c.moe_intermediate_size if kind == "moe" else 0 for kind in kinds],
            "expert_count": c.n_routed_experts, "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": c.moe_intermediate_size, "expert_shared_count": c.n_shared_experts,
            "expert_shared_feed_forward_length": c.moe_shared_expert_intermediate_size,
            "expert_weights_norm": True, "expert_weights_scale": c.routed_scaling_factor,
            "expert_group_count": c.n_group, "expert_group_used_count": c.topk_group,
        }  # fmt: skip
    return {}


# --- tensors -------------------------------------------------------------------------------------------------


def _tensors(name: str, model: Any) -> Iterator[tuple[str, Tensor]]:
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        found = re.search(r"\.layers\.(\d+)\.", key)
        yield from _written(
            name, key, tensor.float(), model.config, f"blk.{found[1]}." if found else "", table
        )


def _written(name: str, key: str, t: Tensor, c: Any, block: str, table: Any) -> Iterator[tuple[str, Tensor]]:
    stem, _, last = key.rpartition(".")
    if last in ("gate_up_proj", "up_proj", "down_proj"):  # experts: parameters of no module
        parts = (
            {"gate": t.chunk(2, 1)[0], "up": t.chunk(2, 1)[1]} if last == "gate_up_proj" else {last[:-5]: t}
        )
        for part, values in parts.items():
            yield f"{block}ffn_{part}_exps.weight", values
    elif key.endswith("shared_mlp.input_linear.weight"):
        gate, up = t.chunk(2)
        yield from ((f"{block}ffn_gate_shexp.weight", gate), (f"{block}ffn_up_shexp.weight", up))
    elif key.endswith("in_proj_qkvz.weight"):
        yield from zip((f"{block}attn_qkv.weight", f"{block}attn_gate.weight"), _apart(t, c), strict=True)
    elif last in ("A_log", "D", "dt_bias"):
        yield (
            f"{block}{_STATE[last]}",
            _of_heads(name, last, t, c),
        )
    elif last in ("e_score_correction_bias", "expert_bias"):
        yield f"{block}exp_probs_b.bias", t
    elif name == "falcon-h1" and key.endswith("pre_ff_layernorm.weight"):
        yield f"{block}ffn_norm", t
    else:
        stem = stem.replace("router", "router.layer") if name == "granitehybrid" else stem
        stem = stem.replace("model.layers", "backbone.layers") if name.startswith("nemotron") else stem
        yield f"{table.get_name(stem)}.{last}", _changed(name, key, t, c)


def _apart(t: Tensor, c: Any) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of all heads; gates of all."""
    each = c.linear_num_value_heads // c.linear_num_key_heads * c.linear_value_head_dim
    of_heads = t.chunk(c.linear_num_key_heads)  # a key head's q, k, v, z
    split = [head.split([c.linear_key_head_dim] * 2 + [each] * 2) for head in of_heads]
    q, k, v, z = (torch.cat([head[i] for head in split]) for i in range(4))
    return torch.cat([q, k, v]), z


def _of_heads(name: str, last: str, t: Tensor, c: Any) -> Tensor:
    if name.startswith("qwen35"):
        t = _tiled(t, c, 1)
    t = -torch.exp(t) if last == "A_log" else t
    is_column = last != "dt_bias" and name in ("falcon-h1", "granitehybrid", "nemotron_h_moe", "mamba2")
    return t.reshape(-1, 1) if is_column else t


def _tiled(t: Tensor, c: Any, width: int) -> Tensor:
    """Value heads so that the first of every key head come first, then the second of every one."""
    keys, each = c.linear_num_key_heads, c.linear_num_value_heads // c.linear_num_key_heads
    order = [key * each + i for i in range(each) for key in range(keys)]
    return torch.cat([t[head * width : (head + 1) * width] for head in order])


def _changed(name: str, key: str, t: Tensor, c: Any) -> Tensor:
    if ".conv1d.weight" in key or ".conv.conv.weight" in key:
        t = t.squeeze(1)
    if name.startswith("qwen35") and ".linear_attn." in key:
        t = _reordered(key, t, c)
    if name.startswith("qwen3") and key.endswith("norm.weight") and "linear_attn" not in key:
        t = t + 1
    if name in ("falcon-h1", "granitehybrid", "nemotron_h_moe", "mamba2") and re.search(
        r"(mamba|mixer)\.norm\.weight", key
    ):
        t = t.reshape(c.n_groups if hasattr(c, "n_groups") else c.mamba_n_groups, -1)
    part = re.search(r"\.([qk])_proj\.", key)
    if part and name in ("granitehybrid", "nemotron_h_moe"):  # halves of heads, interleaved
        heads = c.num_attention_heads if part[1] == "q" else c.num_key_value_heads
        t = t.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(t.shape)
    return t


def _reordered(key: str, t: Tensor, c: Any) -> Tensor:
    first = 2 * c.linear_num_key_heads * c.linear_key_head_dim
    if ".in_proj_qkv." in key or ".conv1d." in key:
        return torch.cat([t[:first], _tiled(t[first:], c, c.linear_value_head_dim)])
    if ".in_proj_z." in key:
        return _tiled(t, c, c.linear_value_head_dim)
    if ".in_proj_a." in key or ".in_proj_b." in key:
        return _tiled(t, c, 1)
    return _tiled(t.T, c, c.linear_value_head_dim).T.contiguous() if ".out_proj." in key else t
