"""Tiny models of kinds that differ in how they attend, cache, route or end, each for what it does unlike Llama."""

from __future__ import annotations

from typing import Any

__all__ = ["HYBRIDS", "REFUSED", "SERVED"]

_SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_MOE = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_OPT = {
    "vocab_size": 384,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "init_std": 0.2,
}
_GPT2 = {
    "vocab_size": 384,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_DELTA = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
}
_SCAN = {
    "num_hidden_layers": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 12,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}
# More channels than a tile of a state has, and not a multiple of it.
_MAMBA1 = {
    "vocab_size": 384, "hidden_size": 36, "num_hidden_layers": 2, "state_size": 5, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
_JAMBA = {
    "mamba_d_state": 5,
    "mamba_dt_rank": 3,
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
_ZAMBA = {
    "mamba_d_state": 5, "mamba_dt_rank": 3, "n_mamba_heads": 2, "num_key_value_heads": 4, "num_hidden_layers": 3,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
}  # fmt: skip
_LIGHTNING = {
    "num_hidden_layers": 3, "num_local_experts": 4, "block_size": 16, "linear_attn_alpha_factor": 1.5,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_CHUNKS = {
    "no_rope_layers": [1, 0], "moe_layers": [1], "intermediate_size_mlp": 40, "num_local_experts": 4,
    "floor_scale": 16, "attn_scale": 0.5,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
# name -> (type, config). Served: as transformers has them.
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    # keys and values of different widths
    "deepseek_v3": ("deepseek_v3", _SMALL | _MLA | _MOE | _GROUPS),
    "minicpm3": ("minicpm3", _SMALL | _MLA),
    # angles as complex numbers
    "deepseek_v2": ("deepseek_v2", _SMALL | _MLA | _MOE | _GROUPS),
    # heads of other numbers and widths in layers with a window
    "mimo_v2_flash": (
        "mimo_v2_flash",
        _SMALL
        | _MOE
        | _GROUPS
        | {"head_dim": 16, "v_head_dim": 12, "swa_head_dim": 16, "swa_v_head_dim": 12, "sliding_window": 24}
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
    ),
    "gemma4_text": (
        "gemma4_text",
        _SMALL
        | {"head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 0}
        | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384},
    ),
    # layers that attend to another layer's keys
    "gemma4-shared": (
        "gemma4_text",
        _SMALL
        | {"head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
        | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384},
    ),
    # a window that stands in the mask alone
    "qwen2_moe-window": (
        "qwen2_moe",
        _SMALL
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 8}
        | {"num_experts_per_tok": 2, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    # builds a mask of a window of 0, which no layer uses
    "qwen2_moe": (
        "qwen2_moe",
        _SMALL
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 8}
        | {"num_experts_per_tok": 2, "use_sliding_window": False},
    ),
    "phimoe-window": ("phimoe", _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}),
    # attends twice in a layer; runs layers several times
    "diffllama": ("diffllama", _SMALL),
    "hrm_text": ("hrm_text", _SMALL | {"num_hidden_layers": 4}),
    # the head follows another module than the one its class names
    "opt": ("opt", _OPT | {"word_embed_proj_dim": 32}),
    "opt-projected": ("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    # flattens what was attended by `view`; gates it
    "afmoe": (
        "afmoe",
        _SMALL
        | {"head_dim": 8, "sliding_window": 24, "moe_intermediate_size": 16, "num_experts": 8}
        | {"num_experts_per_tok": 2, "num_shared_experts": 1, "num_dense_layers": 1, "n_group": 1, "topk_group": 1},
    ),
    # does not hand keywords down to its layers
    "nemotron": ("nemotron", _SMALL | {"head_dim": 8}),
    # one key head for all queries
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    # its router reads its weight's dtype
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _SMALL | {"head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    # layer norms, partial rotary angles, parallel residuals, biases, GELU
    "gpt_neox": ("gpt_neox", {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
    "phi": ("phi", _SMALL),
    "stablelm": ("stablelm", _SMALL | {"qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", _SMALL | {"sliding_window": 24}),
    "cohere": ("cohere", _SMALL | {"use_qk_norm": True}),
    # factors on embeddings, residuals, scores and logits
    "granite": (
        "granite",
        _SMALL
        | {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.0156},
    ),
    # angles and scores that change beyond the first context
    "llama-yarn": ("llama", _SMALL | {"head_dim": 8, "rope_parameters": _YARN | {"attention_factor": 1.0}}),
    "ministral3": (
        "ministral3",
        _SMALL | {"head_dim": 8, "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
        | {"llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0}},
    ),
    # layers without positions among layers with a window
    "exaone4": ("exaone4", _SMALL | {"head_dim": 8, "sliding_window": 24, "sliding_window_pattern": 2}),
    "smollm3": ("smollm3", _SMALL),
    # contexts cut into chunks; queries scaled by their position; experts whose inputs are weighted
    "llama4_text": ("llama4_text", _SMALL | _CHUNKS | {"head_dim": 8, "attention_chunk_size": 20}),
    "llama4_text-odd": (
        "llama4_text",
        _SMALL | _CHUNKS | {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}
        | {"attention_chunk_size": 17, "num_experts_per_tok": 2, "use_qk_norm": False, "moe_layers": [0, 1]},
    ),
    # an index chooses keys in contexts that are longer than these
    **{
        name: (name, _SMALL | _MLA | _MOE | _GROUPS | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 100})
        for name in ("axk2", "deepseek_v32", "glm_moe_dsa")
    },
    # an index chooses blocks of keys
    "minimax_m3_vl_text": (
        "minimax_m3_vl_text",
        _SMALL | {"head_dim": 8, "rotary_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"mlp_layer_types": ["dense", "sparse"], "dense_intermediate_size": 64, "shared_intermediate_size": 16}
        | {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_topk_blocks": 5, "index_block_size": 20}
        | {"index_n_heads": 2, "index_head_dim": 8},
    ),
    # experts of attention and of the MLP that take rows sorted by expert, each by a product of its own
    "jetmoe": ("jetmoe", _SMALL | {"kv_channels": 12, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # hyper-connections, which multiply by a parameter
    "hy_v4": (
        "hy_v4",
        _SMALL | _MLA | {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"n_shared_experts": 1, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 100},
    ),
    # recurrent layers: the gated delta rule, with experts and with projections of its own
    "qwen3_5_text": ("qwen3_5_text", _SMALL | _DELTA | {"head_dim": 8}),
    "qwen3_next": ("qwen3_next", _SMALL | _DELTA | _EXPERTS | {"head_dim": 8, "num_experts": 4}),
    "olmo_hybrid": ("olmo_hybrid", _SMALL | _DELTA),
    # Mamba-2's scan, in layers of its own and beside attention
    "granitemoehybrid-scan": (
        "granitemoehybrid",
        _SMALL | _SCAN | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4}
        | {"num_experts_per_tok": 2, "shared_intermediate_size": 16},
    ),
    "falcon_h1": ("falcon_h1", _SMALL | _SCAN | {"num_hidden_layers": 2, "head_dim": 8, "mamba_d_ssm": 64}),
    # Mamba-1's scan: in all layers, with norms of its own; a residual in float32
    "falcon_mamba": ("falcon_mamba", _MAMBA1),
    "mamba": ("mamba", _MAMBA1 | {"use_conv_bias": False}),
    # and beside attention and experts; with heads whose weights are parameters of the layer
    "jamba": ("jamba", _SMALL | _JAMBA),
    "zamba": ("zamba", _SMALL | _ZAMBA),
    # lightning attention, beyond several of its blocks, with factors on residuals
    "minimax": ("minimax", _SMALL | _LIGHTNING),
    # short convolutions alone
    "lfm2": (
        "lfm2",
        _SMALL | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3},
    ),
    # text and pictures: the text is served
    "gemma3": (
        "gemma3",
        {
            "text_config": _SMALL | {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8},
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    # and sound, whose part knows no sdpa
    "gemma4": (
        "gemma4",
        {
            "text_config": _SMALL
            | {"head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 2, "num_kv_shared_layers": 0}
            | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
            | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384},
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
            },
            "audio_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    ),
}  # fmt: skip
# Served too; in `trainer/test_exact_recurrence.py`: more of those that hold a state, in few layers of odd sizes.
_FEW = _SMALL | {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("bamba", _FEW | _SCAN | {"num_hidden_layers": 2, "attn_layer_indices": [1]}
              | {"mamba_n_heads": 6, "mamba_d_head": 12, "mamba_n_groups": 3, "tie_word_embeddings": True}),
    "kimi_linear": (
        "kimi_linear",
        _SMALL | _MLA | {"num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 16}
        | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
        | {"linear_num_heads": 3, "linear_head_dim": 12, "num_expert_group": 1, "topk_group": 1},
    ),
    # the same recurrence, behind convolutions whose weights stay in float32
    "bailing_hybrid": (
        "bailing_hybrid",
        _SMALL | _MLA | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "num_hidden_layers": 3, "head_dim": 8}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
        | {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        _FEW | {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "num_dense_layers": 1},
    ),
    "lfm3": (
        "lfm3",
        _FEW | {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "conv"], "sliding_window": 24},
    ),
    # all states, and no positions
    "mamba2": (
        "mamba2",
        {"hidden_size": 36, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 12, "state_size": 10, "n_groups": 3}
        | {"vocab_size": 384, "chunk_size": 16, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.2},
    ),
    "nemotron_h": (
        "nemotron_h",
        _FEW | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4}
        | {"mamba_num_heads": 6, "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 10, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
        | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
    "qwen3_next": SERVED["qwen3_next"],
    **{name: SERVED[name] for name in ("falcon_mamba", "jamba", "minimax", "zamba")},
}  # fmt: skip
# name -> (type, config, a word of the refusal)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen4_exp_text": (
        "qwen4_exp_text",
        _SMALL
        | _DELTA
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {
            "shared_expert_intermediate_size": 16,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
        }
        | {"indexer_budget": 32, "indexer_compress_ratio": 4, "hc_lowrank": 16},
        "dilated convolution",
    ),
    "gptj": ("gptj", _GPT2 | {"n_inner": 32, "rotary_dim": 8}, "AttentionInterface"),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": 384,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 256,
        }
        | {"attention_types": [[["global", "local"], 1]], "window_size": 24},
        "AttentionInterface",
    ),
    "falcon": (
        "falcon",
        {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "AttentionInterface",
    ),
    "bloom": ("bloom", {"vocab_size": 384, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "context may be"),
    "doge": ("doge", _SMALL, "a mask of its own"),
}
