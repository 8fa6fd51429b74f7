"""The tables of architectures with recurrent layers: gated delta rule, Mamba's scans, short convolutions.

Which layer is of which kind is read off the tensors of each block, and lists of the metadata must agree with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from myserve.engine.weights.formats.from_gguf.architectures import (
    ATTENDING,
    EXPERTS,
    GRANITE,
    MOE,
    ROPE_KEYS,
    Architecture,
    Parts,
    Told,
)
from myserve.engine.weights.formats.from_gguf.undo import (
    Undo,
    by_head,
    columns_by_key_head,
    conv_weight,
    decay_log,
    flat,
    halves_of_heads,
    joined_by_key_head,
    minus_one,
    rows_by_key_head,
    values_by_key_head,
)
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = ["HYBRIDS"]

_Undone = dict[str, tuple[Undo, ...]]
_PER_LAYER = frozenset({"attention.head_count_kv"})
_SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_STATE: dict[str, tuple[Parts, ...]] = {
    ".A_log": (Parts(("ssm_a",)),),
    ".D": (Parts(("ssm_d",)),),
    ".dt_bias": (Parts(("ssm_dt.bias",)),),
}
_NORMS: _Undone = dict.fromkeys(
    (
        *("attn_norm.weight", "post_attention_norm.weight", "attn_q_norm.weight", "attn_k_norm.weight"),
        "output_norm.weight",
    ),
    (minus_one,),
)
_HALVES: _Undone = {
    "attn_q.weight": (halves_of_heads(lambda config: int(config.num_attention_heads)),),
    "attn_k.weight": (halves_of_heads(lambda config: int(config.num_key_value_heads)),),
}
_SCAN: _Undone = {
    "ssm_conv1d.weight": (conv_weight,),
    "ssm_a": (by_head(decay_log),),
    "ssm_d": (flat,),
    "ssm_norm.weight": (flat,),
}

# --- the gated delta rule: Qwen3-Next, Qwen3.5 ---

_DELTA_NAMES = ATTENDING | {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_DELTA_READ = ROPE_KEYS | {
    *("ssm.inner_size", "attention.recurrent_layers", "nextn_predict_layers"),
    # of no effect: layers are told by their tensors, and a text's three positions are one
    *("full_attention_interval", "rope.dimension_sections"),
}
_GROUPED: _Undone = _NORMS | {
    "ssm_a": (rows_by_key_head, decay_log),
    "ssm_dt.bias": (rows_by_key_head,),
    "ssm_alpha.weight": (rows_by_key_head,),
    "ssm_beta.weight": (rows_by_key_head,),
    "ssm_conv1d.weight": (values_by_key_head, conv_weight),
    "attn_qkv.weight": (values_by_key_head,),
    "attn_gate.weight": (values_by_key_head,),
    "ssm_out.weight": (columns_by_key_head,),
}
_SHARED_GATE: _Undone = {
    "ffn_gate_inp_shexp.weight": (lambda values, config: values.reshape(1, -1),)
}  # as older converters have it, it is a vector


def _delta(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    more = told.values.get("nextn_predict_layers", 0)  # blocks behind the model, which predict further tokens
    if not isinstance(more, int) or not 0 <= more < told.size("block_count"):
        raise BadCheckpointError(f"{told.file} says {told.name}.nextn_predict_layers is {more}")
    layers = told.size("block_count") - more
    kinds = told.kinds(layers, {"ssm_a": "linear_attention", "attn_q.weight": "full_attention"})
    told.refuse_other(
        "attention.recurrent_layers", [kind == "linear_attention" for kind in kinds] + [False] * more
    )
    width = values["head_dim"]
    turned = told.values.get("rope.dimension_count", width)
    return {
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "linear_value_head_dim": told.share("ssm.inner_size", "ssm.time_step_rank"),
        "attention_bias": told.has("attn_q.bias"),
        "rope_parameters": values["rope_parameters"] | {"partial_rotary_factor": _fraction(turned, width)},
    }


def _fraction(part: int, whole: int) -> float:
    """Return the fraction of which transformers makes `part` by cutting off: int(whole * fraction)."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 2.0)


# --- Mamba's scans: Falcon-H1, Granite 4, Nemotron-H, Mamba itself ---

_SCAN_READ = ROPE_KEYS | {"ssm.inner_size", "ssm.time_step_rank"}
_MAMBA = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
}


def _falcon_h1(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose multipliers are all 1: a file has them multiplied into its weights."""
    if values["tie_word_embeddings"]:
        raise UnsupportedModelError(
            f"{told.file} has no output.weight, and the multiplier of its logits is lost with it: take the model's "
            "safetensors"
        )
    return {
        "mamba_d_head": told.share("ssm.inner_size", "ssm.time_step_rank"),
        "mamba_rms_norm": told.has("ssm_norm.weight"),
        "mamba_norm_before_gate": False,  # as llama.cpp computes it, where there is such a norm
        **_biases(told, mamba_conv_bias="ssm_conv1d", mamba_proj_bias="ssm_in", projectors_bias="ssm_out"),
        **_biases(told, attention_bias="attn_q", mlp_bias="ffn_gate"),
    }


def _granite(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    layers, hidden = values["num_hidden_layers"], told.size("embedding_length")
    kinds = told.kinds(layers, {"ssm_a": "linear_attention", "attn_q.weight": "full_attention"})
    _refuse_other_heads(told, kinds)
    if (
        "linear_attention" in kinds
    ):  # Bamba has it so: part of a head is turned, and its layers have other names
        told.refuse_value("rope.scaling.finetuned", False)
    return {
        "layer_types": kinds,
        "position_embedding_type": None,
        "mamba_expand": told.share("ssm.inner_size", "embedding_length"),
        "mamba_d_head": told.share("ssm.inner_size", "ssm.time_step_rank"),
        "shared_intermediate_size": values.get("shared_intermediate_size", 4 * hidden),
        **_biases(told, mamba_conv_bias="ssm_conv1d", mamba_proj_bias="ssm_in", attention_bias="attn_q"),
    }


def _nemotron_h(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = told.kinds(
        values["num_hidden_layers"],
        {
            "ssm_a": "linear_attention",
            "attn_q.weight": "full_attention",
            "ffn_gate_inp.weight": "moe",
            "ffn_up.weight": "mlp",
        },
    )
    _refuse_other_heads(told, kinds)
    told.refuse_value("rope.scaling.finetuned", False)
    rows = [told.tensors[f"blk.{i}.ffn_up.weight"].shape[0] for i, kind in enumerate(kinds) if kind == "mlp"]
    return {
        "layers_block_type": kinds,
        "mamba_head_dim": told.share("ssm.inner_size", "ssm.time_step_rank"),
        "intermediate_size": rows[0] if rows else 1,
        **_biases(told, use_conv_bias="ssm_conv1d", mamba_proj_bias="ssm_in", use_bias="ssm_out"),
        **_biases(told, attention_bias="attn_q", mlp_bias="ffn_up"),
    }


def _mamba2(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "expand": told.share("ssm.inner_size", "embedding_length"),
        "head_dim": told.share("ssm.inner_size", "ssm.time_step_rank"),
        **_biases(told, use_conv_bias="ssm_conv1d", use_bias="ssm_in"),
    }


def _mamba(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    told.refuse_value("ssm.dt_b_c_rms", False)  # Falcon-Mamba: the epsilon of those norms is not in the file
    return {
        "expand": told.share("ssm.inner_size", "embedding_length"),
        **_biases(told, use_conv_bias="ssm_conv1d", use_bias="ssm_in"),
    }


def _jamba(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    kinds = told.kinds(layers, {"ssm_a": "linear_attention", "attn_q.weight": "full_attention"})
    _refuse_other_heads(told, kinds)
    attend = _every(told, [kind == "full_attention" for kind in kinds])
    choose = _every(told, [told.has("ffn_gate_inp.weight", i) for i in range(layers)])
    return {
        "attn_layer_period": attend[0],
        "attn_layer_offset": attend[1],
        "expert_layer_period": choose[0],
        "expert_layer_offset": choose[1],
        "mamba_expand": told.share("ssm.inner_size", "embedding_length"),
        **_biases(told, mamba_conv_bias="ssm_conv1d", mamba_proj_bias="ssm_in"),
    }


def _every(told: Told, has: list[bool]) -> tuple[int, int]:
    """Return by which period layers have something, and the first of them: as Jamba's config says it."""
    layers = [i for i, it_has in enumerate(has) if it_has] or [len(has)]
    period = max(layers[1] - layers[0] if len(layers) > 1 else len(has), layers[0] + 1)
    if has != [i % period == layers[0] for i in range(len(has))]:
        raise UnsupportedModelError(
            f"{told.file} has layers {layers} of one kind, in no period, which is not read from GGUF: take the model's "
            "safetensors"
        )
    return period, layers[0]


def _biases(told: Told, **stems: str) -> dict[str, bool]:
    return {name: told.has(f"{stem}.bias") for name, stem in stems.items()}


def _refuse_other_heads(told: Told, kinds: list[str]) -> None:
    """Raise BadCheckpointError where layers with heads of keys are other ones than those that attend."""
    heads = told.values.get("attention.head_count_kv")
    if isinstance(heads, list):
        told.refuse_other(
            "attention.head_count_kv",
            [max(heads, default=0) if kind == "full_attention" else 0 for kind in kinds],
        )


# --- short convolutions: LFM2 ---

_CONV_NAMES = (ATTENDING | {"shortconv.l_cache": "conv_L_cache"}) | {
    "attention.layer_norm_rms_epsilon": "norm_eps"
}
_CONV: _Undone = {"shortconv.conv.weight": (conv_weight,)}


def _lfm2(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = told.kinds(
        values["num_hidden_layers"], {"shortconv.conv.weight": "conv", "attn_q.weight": "full_attention"}
    )
    _refuse_other_heads(told, kinds)
    return {"layer_types": kinds, "conv_bias": told.has("shortconv.conv.bias")}


def _lfm2_moe(told: Told, values: Mapping[str, Any]) -> dict[str, Any]:
    told.refuse_value("expert_gating_func", 2)  # a sigmoid of each
    return _lfm2(told, values) | {"use_expert_bias": told.has("exp_probs_b.bias")}


HYBRIDS: Mapping[str, Architecture] = {
    "qwen35": Architecture(
        "qwen3_5_text", _DELTA_NAMES, read=_DELTA_READ, more=_delta, rope="part",
        undo=_GROUPED, parts=_STATE,
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text", _DELTA_NAMES | MOE | _SHARED, read=_DELTA_READ, more=_delta, rope="part",
        undo=_GROUPED | _SHARED_GATE, parts=_STATE | EXPERTS,
    ),
    "qwen3next": Architecture(
        "qwen3_next", _DELTA_NAMES | MOE | _SHARED,
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        read=_DELTA_READ, more=_delta, rope="part",
        # its value heads are not stored in another order, but its projections apart
        undo=_NORMS | _SHARED_GATE | {"ssm_conv1d.weight": (conv_weight,), "ssm_a": (decay_log,)},
        parts=_STATE | EXPERTS
        | {
            ".in_proj_qkvz.weight": (
                Parts(("attn_qkv.weight", "attn_gate.weight"), joined_by_key_head),
                Parts(("ssm_in.weight",)),  # as converters of 2025 left it
            )
        },
    ),
    "lfm2": Architecture(
        "lfm2", _CONV_NAMES, {"block_auto_adjust_ff_dim": False}, per_layer=_PER_LAYER, more=_lfm2,
        names_head_dim=False, undo=_CONV,
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        _CONV_NAMES | MOE
        | {"leading_dense_block_count": "num_dense_layers", "expert_weights_scale": "routed_scaling_factor"},
        {"norm_topk_prob": True}, read=ROPE_KEYS | {"expert_gating_func"}, per_layer=_PER_LAYER, more=_lfm2_moe,
        names_head_dim=False, undo=_CONV, parts=EXPERTS | {".expert_bias": (Parts(("exp_probs_b.bias",)),)},
    ),
    "falcon-h1": Architecture(
        "falcon_h1", ATTENDING | _MAMBA | {"ssm.inner_size": "mamba_d_ssm"}, read=_SCAN_READ, more=_falcon_h1,
        undo=_SCAN,
        parts=_STATE | {".pre_ff_layernorm.weight": (Parts(("ffn_norm",)), Parts(("ffn_norm.weight",)))},
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid",
        ATTENDING | _MAMBA | GRANITE
        | {
            "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
            "expert_shared_feed_forward_length": "shared_intermediate_size",
        },
        read=_SCAN_READ, per_layer=_PER_LAYER, more=_granite, names_head_dim=False, rope="none",
        needed=("attention.scale",),
        undo=_SCAN | _HALVES,
        parts=_STATE | EXPERTS
        | {
            ".shared_mlp.input_linear.weight": (
                Parts(("ffn_gate_shexp.weight", "ffn_up_shexp.weight")), Parts(("ffn_gate.weight", "ffn_up.weight")),
            ),
            ".shared_mlp.output_linear.weight": (
                Parts(("ffn_down_shexp.weight",)), Parts(("ffn_down.weight",)),
            ),
        },
        renamed=((".block_sparse_moe.router.", ".block_sparse_moe.router.layer."),),
    ),
    **{
        name: Architecture(
            "nemotron_h",
            ATTENDING
            | {
                "attention.layer_norm_epsilon": "layer_norm_epsilon",
                "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
                "ssm.conv_kernel": "conv_kernel", "ssm.state_size": "ssm_state_size", "ssm.group_count": "n_groups",
                "ssm.time_step_rank": "mamba_num_heads", "expert_count": "n_routed_experts",
                "expert_used_count": "num_experts_per_tok", "expert_shared_count": "n_shared_experts",
                "expert_feed_forward_length": "moe_intermediate_size",
                "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
                "expert_weights_norm": "norm_topk_prob", "expert_weights_scale": "routed_scaling_factor",
                "expert_group_count": "n_group", "expert_group_used_count": "topk_group",
            },
            read=_SCAN_READ, per_layer=_PER_LAYER | {"feed_forward_length"}, more=_nemotron_h,
            rope="none",
            undo=_SCAN | _HALVES,
            parts=_STATE | EXPERTS | {".gate.e_score_correction_bias": (Parts(("exp_probs_b.bias",)),)},
            renamed=(("model.layers.", "backbone.layers."),),
        )
        for name in ("nemotron_h", "nemotron_h_moe")
    },
    "jamba": Architecture(
        "jamba",
        ATTENDING
        | {
            "ssm.conv_kernel": "mamba_d_conv", "ssm.state_size": "mamba_d_state",
            "ssm.time_step_rank": "mamba_dt_rank",
            "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
        },
        read=_SCAN_READ, per_layer=_PER_LAYER, more=_jamba, names_head_dim=False, rope="none",
        undo={"ssm_conv1d.weight": (conv_weight,), "ssm_a": (decay_log,)}, parts=_STATE | EXPERTS,
    ),
    "mamba2": Architecture(
        "mamba2",
        {
            "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "state_size", "ssm.time_step_rank": "num_heads", "ssm.group_count": "n_groups",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
        },
        read=_SCAN_READ | {"context_length", "feed_forward_length", "attention.head_count"}, more=_mamba2,
        attends=False, undo=_SCAN, parts=_STATE,
    ),
    "mamba": Architecture(
        "mamba",
        {
            "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "state_size", "ssm.time_step_rank": "time_step_rank",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
        },
        read=_SCAN_READ | {"context_length", "feed_forward_length", "attention.head_count", "ssm.dt_b_c_rms"},
        more=_mamba, attends=False, undo={"ssm_conv1d.weight": (conv_weight,), "ssm_a": (decay_log,)}, parts=_STATE,
    ),
}  # fmt: skip
