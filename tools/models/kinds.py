"""Every kind of model that is tried, as a tiny one: causal types, some types with towers, and variants of both.

A type's config is made of names that its own class has, at small sizes (`_SIZES`); what a type needs beside them stands
in `_CHANGES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.combine.tiny import VOCAB_SIZE, byte_level_tokenizer
from myserve.engine.weights.empty_model import auto_class

__all__ = ["KINDS", "TYPES", "VARIANTS", "make", "sizes"]

LARGEST = 40_000_000  # weights of a model that is still tiny
# Published with towers, and no causal type of transformers: served for text.
_WITH_TOWERS = ("internvl", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl")

# What configs call their sizes, and how large they are here.
_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k", "experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "decoder_sparse_step"), 1),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    "sliding_window": 40,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "swa_v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 256,
    "index_topk_blocks": 16,
    "index_block_size": 16,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_key_head_dim", "linear_head_dim"), 12),
    "linear_value_head_dim": 20,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 12),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("mamba_chunk_size",), 16),
    "mamba_d_ssm": 128,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "image_size": 28,
    "patch_size": 14,
    "mm_tokens_per_image": 4,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
# The same with `--sizes odd`: heads on one of keys and values, widths that no register divides, tied embeddings.
_ODD_SIZES: Mapping[str, Any] = {
    **{
        name: {64: 120, 96: 91, 32: 21}.get(value, value)
        for name, value in _SIZES.items()
        if name != "vocab_size"
    },
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 5),
    **dict.fromkeys(("encoder_attention_heads",), 5),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "experts_per_token", "moe_topk"), 3),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 7),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 6),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 40),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 9),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 3),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 6),
    **dict.fromkeys(("linear_key_head_dim", "linear_head_dim"), 10),
    **dict.fromkeys(("v_head_dim", "swa_v_head_dim"), 10),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    "num_key_value_heads": 1,
    "ffn_dim": 90,
    "linear_num_key_heads": 3,
    "linear_value_head_dim": 14,
    "mamba_d_ssm": 240,
    "mamba_chunk_size": 13,
    "sliding_window": 37,
    "kv_lora_rank": 18,
    "q_lora_rank": 22,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
    "index_head_dim": 14,
    "tie_word_embeddings": True,
}
_OF_SIZES = {"usual": _SIZES, "odd": _ODD_SIZES}
_ODD_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 4, 5]}
# Where a type must have as many of one as of another; what it must have beside other sizes.
_ODD_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "mamba2": {"num_heads": 6, "n_groups": 3, "state_size": 9, "head_dim": 40, "chunk_size": 13},
    "olmo_hybrid": {"linear_num_key_heads": 6},
    "diffllama": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20},
    "hrm_text": {"initializer_range": 0.05},  # its many passes make noise of larger weights, in float64 too
    "minimax": {"block_size": 13},
    "mimo_v2_flash": {"num_attention_heads": 6},  # layers with a window have twice the heads of keys
    "qwen2_5_vl_text": {"rope_parameters": _ODD_MROPE},
    "qwen3_vl_text": {"rope_parameters": _ODD_MROPE | {"mrope_interleaved": True}},
}
_MLA = {"num_key_value_heads": 4, "head_dim": None}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MSCALE = {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
}
_WINDOW = {"use_sliding_window": True, "max_window_layers": 2}


def _heads(count: int, dim: int) -> dict[str, Any]:
    """Many query heads on one of keys and values."""
    return {
        "num_attention_heads": count,
        "num_key_value_heads": 1,
        "hidden_size": count * dim,
        "head_dim": dim,
    }


# Three heads or five, widths that no register divides, one head of keys and values, embeddings tied.
_ODD = {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12} | {
    "intermediate_size": 91,
    "tie_word_embeddings": True,
}
_ODD_DELTA = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
}
_DELTA_LAYERS = [*(["linear_attention"] * 3), "full_attention"]
_MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
# What kinds need beside their sizes: by type. None: leave it to the type's own default.
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "youtu"), _MLA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk1", "axk2", "hy_v4"), _MLA | {"qk_head_dim": None}),
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": 2},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4, "ffn_hidden_size": 96, "zero_expert_num": 2},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "roformer": {"is_decoder": True},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 40},
    "gemma4_text": {"layer_types": _MIXED, "num_kv_shared_layers": 0, "global_head_dim": 32},
    "gemma3n_text": {"layer_types": _MIXED, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    "bamba": {"attn_layer_indices": [2]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    **{key: {"layer_types": _DELTA_LAYERS, "num_key_value_heads": 4} for key in ("kimi_linear", "bailing_hybrid")},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]},
    "olmo_hybrid": {"linear_num_key_heads": 4},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": None, "head_dim": None},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "minimax": {"block_size": 16},
    "qwen4_exp_text": _QWEN4,
    "llama4_text": {"attention_chunk_size": 40, "floor_scale": 16, "attn_scale": 0.5},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    **{key: {"num_key_value_heads": 4} for key in ("dots3_note", "dots3_note_text")},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 12, "chunk_size": 16},
    "moshi": {"audio_vocab_size": 32},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen3_vl_text": {"rope_parameters": _MROPE | {"mrope_interleaved": True}},
    "gemma3": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        }
    },
}  # fmt: skip
# A type as it may also be configured.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "cohere-norms": ("cohere", {"use_qk_norm": True}),
    "deepseek_v2-plain-queries": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3-wide-values": ("deepseek_v3", {"v_head_dim": 24}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "gemma4_text-one-width": ("gemma4_text", {"global_head_dim": 16}),
    "gemma4_text-shared": ("gemma4_text", {"layer_types": _MIXED[2:] * 2, "num_kv_shared_layers": 2}),
    "gpt_bigcode-many-heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granite-factors": (
        "granite",
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.0156},
    ),
    "llama-7-heads": ("llama", _heads(7, 8)),
    "llama-32-to-1": ("llama", _heads(32, 4)),
    **{f"llama-head-{n}": ("llama", {"head_dim": n}) for n in (10, 80, 100, 256)},
    "llama-odd-sizes": ("llama", _heads(10, 6) | {"intermediate_size": 91, "num_key_value_heads": 2}),
    **{f"{kind}-odd": (kind, _ODD) for kind in ("gemma3_text", "lfm3", "llama", "qwen3", "smollm3")},
    **{f"{kind}-odd": (kind, _ODD | _ODD_DELTA) for kind in ("qwen3_5_text", "qwen3_next")},
    "bamba-odd": ("bamba", _ODD | {"mamba_n_heads": 6, "mamba_d_head": 20, "mamba_n_groups": 3, "mamba_d_state": 9}),
    "kimi_linear-odd": (
        "kimi_linear",
        _ODD | {"num_key_value_heads": 5, "linear_num_heads": 3, "linear_head_dim": 22, "v_head_dim": 10},
    ),
    "nemotron_h-odd": (
        "nemotron_h",
        _ODD | {"mamba_num_heads": 6, "mamba_head_dim": 10, "n_groups": 3, "ssm_state_size": 9},
    ),
    "falcon_mamba-odd": ("falcon_mamba", {"hidden_size": 60, "state_size": 9, "time_step_rank": 7, "use_bias": True}),
    "minimax-odd": ("minimax", _ODD | {"intermediate_size": 92, "block_size": 13}),
    "jamba-odd": (
        "jamba",
        _ODD | {"intermediate_size": 92, "mamba_d_state": 9, "mamba_dt_rank": 7, "mamba_proj_bias": True},
    ),
    "zamba-odd": (
        "zamba",
        _ODD | {"head_dim": None, "n_mamba_heads": 3, "mamba_d_state": 9, "mamba_dt_rank": 7, "mamba_proj_bias": True},
    ),
    "olmo_hybrid-odd": ("olmo_hybrid", _ODD | _ODD_DELTA | {"linear_num_key_heads": 6}),
    "llama4_text-odd": ("llama4_text", _ODD | {"attention_chunk_size": 23, "use_qk_norm": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3_5_text-tied": ("qwen3_5_text", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN | {"attention_factor": 1.0}}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": _YARN | _MSCALE}),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-partial": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "ministral3-scaled-queries": (
        "ministral3",
        {
            "rope_parameters": _YARN
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
            | {"beta_fast": 32.0, "beta_slow": 1.0}
        },
    ),
    "olmo-clipped": ("olmo", {"clip_qkv": 0.5}),
    "opt-projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "phimoe-no-window": ("phimoe", {"sliding_window": None}),
    "qwen2-window": ("qwen2", _WINDOW),
    "qwen2_moe-window": ("qwen2_moe", _WINDOW | {"max_window_layers": 4}),
    "qwen3-window": ("qwen3", _WINDOW),
    "qwen3_moe-window": ("qwen3_moe", _WINDOW),
    "hunyuan_v1_moe-no-norms": ("hunyuan_v1_moe", {"use_qk_norm": False}),
    "stablelm-norms": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
}  # fmt: skip
TYPES = (*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *_WITH_TOWERS)
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in TYPES},
    **VARIANTS,
}


def sizes(base: PreTrainedConfig, change: Mapping[str, Any], kind_of_sizes: str = "usual") -> dict[str, Any]:
    """Return the arguments of a tiny config of a type, those inside it included; `change` counts before."""
    of_name = _OF_SIZES[kind_of_sizes]
    known = set(base.to_dict()) | {name for name in of_name if _has(base, name)}
    writable = [name for name in known if not isinstance(getattr(type(base), name, None), property)]
    found = {name: of_name[name] for name in writable if name in of_name}
    for name, declared in type(base).sub_configs.items():
        inner: Any = declared
        if declared is AutoConfig:  # of any type, which has a default
            inner = type(getattr(base, name))
        if isinstance(inner, type) and issubclass(inner, PreTrainedConfig) and inner is not PreTrainedConfig:
            found[name] = sizes(inner(), _changes(inner.model_type, kind_of_sizes), kind_of_sizes)
            if declared is AutoConfig:
                found[name]["model_type"] = inner.model_type
    found |= change
    return {
        name: value
        for name, value in found.items()
        if value is not None or name in ("sliding_window", "q_lora_rank")
    }


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # some attributes of a config are ambiguous, and say so by an error of their own
        return True


def _changes(arch: str, kind_of_sizes: str) -> Mapping[str, Any]:
    """Return what a type needs beside its sizes."""
    change = _CHANGES.get(arch, {})
    if kind_of_sizes == "usual":
        return change
    # as many heads of keys and values as of queries
    heads = {"num_key_value_heads": 5} if change.get("num_key_value_heads") == 4 else {}
    return {**change, **heads, **_ODD_CHANGES.get(arch, {})}


def make(kind: str, folder: Path, kind_of_sizes: str = "usual") -> None:
    """Write a tiny model of a kind, of "usual" or "odd" sizes. Whatever its class raises is passed on."""
    arch, change = KINDS[kind]
    change = {**_changes(arch, kind_of_sizes), **change}
    config = AutoConfig.for_model(arch, **sizes(AutoConfig.for_model(arch), change, kind_of_sizes))
    with torch.device("meta"):
        count = sum(p.numel() for p in auto_class(config).from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} weights: its config names sizes that are not known here")
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide mistakes
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
