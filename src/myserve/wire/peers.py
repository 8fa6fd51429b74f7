"""Fields of other servers' requests, sorted: what has no effect here passes, what would change an answer is refused.

`tools/peer_fields.py` collects the names from OpenAI's client and the servers' sources; a test fails for one that is
neither a field of ours nor in a table of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["HARMLESS", "REFUSED", "Refused"]


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is not supported: the values that ask for nothing and pass, and what to send instead."""

    idle: tuple[object, ...] = ()
    instead: str = ""


# Accepted and without effect on the answer. They steer billing, tracking and placement at a provider, or are numbers
# of a method that is refused (or off) itself.
HARMLESS: Mapping[str, frozenset[str]] = {
    "names of the caller, for accounts and logs": frozenset(
        [
            "user",
            "safety_identifier",
            "metadata",
            "request_id",
            "rid",
            "session_id",
            "custom_labels",
            "provider",
            "route",
        ]
    ),
    "where a prefix is cached or a request runs": frozenset(
        [
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "cache_prompt",
            "n_cache_reuse",
            "extra_key",
            "id_slot",
            "routed_dp_rank",
            "disagg_prefill_dp_rank",
            "data_parallel_rank",
            "ngram_corpus_id",
            "keep_alive",
            "backend_sampling",
        ]
    ),
    "a shift of the context, which is never made here: what does not fit is refused": frozenset(
        ["n_keep", "n_discard", "truncation_side"]
    ),
    "text that only other tokenizers write, and other routes' answers": frozenset(
        ["spaces_between_special_tokens", "return_token_offsets", "return_mm_kwargs", "include_obfuscation"]
    ),
    "numbers of a method that is off": frozenset(
        [
            "repeat_last_n",
            "dynatemp_exponent",
            "xtc_threshold",
            "dry_base",
            "dry_allowed_length",
            "dry_penalty_last_n",
            "dry_sequence_breakers",
            "mirostat_tau",
            "mirostat_eta",
            "adaptive_decay",
            "reasoning_budget_start_tag",
            "reasoning_budget_end_tag",
            "reasoning_budget_message",
            "reasoning_budget_arm_immediately",
        ]
    ),
    "how a draft is made, which changes no token": frozenset(
        [
            "speculative.n_min",
            "speculative.n_max",
            "speculative.p_min",
            "speculative.type",
            "speculative.ngram_size_n",
            "speculative.ngram_size_m",
            "speculative.ngram_m_hits",
        ]
    ),
}

# An answer that ignores what was asked looks like one that does not. A name that a request has as a field of its own
# is that field; these are the others.
REFUSED: Mapping[str, Refused] = {
    # OpenAI
    "audio": Refused(),
    "best_of": Refused((1,)),
    "echo": Refused((False,)),
    "echo_last": Refused(),
    "function_call": Refused(("none", "auto"), "tool_choice"),
    "functions": Refused(([],), "tools"),
    "modalities": Refused((["text"],)),
    "moderation": Refused(),
    "prediction": Refused(),
    "reasoning_effort": Refused((), "chat_template_kwargs"),
    "service_tier": Refused(("auto", "default")),
    "store": Refused((False,)),
    "suffix": Refused(("",)),
    "verbosity": Refused(),
    "web_search_options": Refused(),
    # vLLM
    "add_generation_prompt": Refused((True,)),
    "add_special_tokens": Refused((False,)),
    "chat_template": Refused(),
    "continue_final_message": Refused((False,)),
    "documents": Refused(([],)),
    "early_stopping": Refused((False,)),
    "ec_transfer_params": Refused(({},)),
    "guided_decoding_backend": Refused(("auto",)),
    "guided_whitespace_pattern": Refused(),
    "include_reasoning": Refused((True,)),
    "kv_transfer_params": Refused(({},)),
    "length_penalty": Refused((1, 1.0)),
    "logits_processors": Refused(([],)),
    "media_io_kwargs": Refused(({},)),
    "mm_processor_kwargs": Refused(({},)),
    "prompt_embeds": Refused(),
    "prompt_logprob_start": Refused((0,), "/inference/v1/generate"),
    "prompt_logprob_token_ids": Refused(([],), "prompt_logprobs"),
    "repetition_detection": Refused(),
    "return_prompt_text": Refused((False,), "return_token_ids"),
    "routed_experts_prompt_start": Refused((0,)),
    "thinking_token_budget": Refused((-1,)),
    "tools": Refused(([],)),
    "tool_choice": Refused(("none", "auto")),
    "truncate_prompt_tokens": Refused((), "a shorter prompt"),
    "use_beam_search": Refused((False,)),
    "vllm_xargs": Refused(({},)),
    "watermarking": Refused((False,)),
    # SGLang
    "bootstrap_host": Refused(),
    "bootstrap_port": Refused(),
    "bootstrap_room": Refused(),
    "custom_logit_processor": Refused(),
    "custom_params": Refused(({},)),
    "ebnf": Refused((), "grammar"),
    "images_config": Refused(({},)),
    "input_ids": Refused((), "/v1/completions with a prompt of ids"),
    "lora_path": Refused((), "model, with the adapter's name"),
    "max_dynamic_patch": Refused(),
    "max_new_tokens": Refused((), "max_tokens"),
    "min_dynamic_patch": Refused(),
    "min_new_tokens": Refused((0,), "min_tokens"),
    "no_stop_trim": Refused((False,), "include_stop_str_in_output"),
    "return_cached_tokens_details": Refused((False,), "usage.prompt_tokens_details"),
    "return_hidden_states": Refused((False,)),
    "return_meta_info": Refused((False,), "perf_metrics_in_response"),
    "return_prompt_token_ids": Refused((False,), "return_token_ids"),
    "return_routed_experts": Refused((False,), "include_routing_matrix"),
    "routed_experts_start_len": Refused((0,)),
    "sampling_seed": Refused((), "seed"),
    "separate_reasoning": Refused((True,)),
    "session_params": Refused(({},)),
    "stop_regex": Refused(([], "")),
    "stream_reasoning": Refused((True,)),
    "task": Refused(),
    "use_audio_in_video": Refused((False,)),
    # llama.cpp
    "adaptive_target": Refused((-1, -1.0)),
    "chat_format": Refused(),
    "chat_parser": Refused(),
    "dry_multiplier": Refused((0, 0.0)),
    "dynatemp_range": Refused((0, 0.0)),
    "grammar_lazy": Refused((False,)),
    "grammar_triggers": Refused(([],), "structured_outputs.structural_tag"),
    "lora": Refused(([],)),
    "min_keep": Refused((0, 1)),
    "mirostat": Refused((0,)),
    "n_cmpl": Refused((1,), "n"),
    "n_indent": Refused((0,)),
    "n_predict": Refused((-1,), "max_tokens"),
    "n_probs": Refused((0,), "top_logprobs"),
    "parse_tool_calls": Refused((True,)),
    "post_sampling_probs": Refused((False,), "logprobs_mode"),
    "preserved_tokens": Refused(([],)),
    "reasoning_budget_tokens": Refused((-1,), "thinking_token_budget"),
    "reasoning_format": Refused(("auto", "deepseek")),
    "repeat_penalty": Refused((1, 1.0), "repetition_penalty"),
    "response_fields": Refused(([],)),
    "return_progress": Refused((False,)),
    "return_tokens": Refused((False,), "return_token_ids"),
    "samplers": Refused(([], "")),
    "t_max_predict_ms": Refused((-1, 0), "request_timeout"),
    "thinking_forced_open": Refused((False,)),
    "timings_per_token": Refused((False,), "perf_metrics_in_response"),
    "typ_p": Refused((1, 1.0), "typical_p"),
    "xtc_probability": Refused((0, 0.0)),
    # TGI and transformers
    "adapter_id": Refused(),
    "bad_words_ids": Refused(([],), "bad_words"),
    "decoder_input_details": Refused((False,), "prompt_logprobs"),
    "details": Refused((False,), "logprobs"),
    "do_sample": Refused((True,), "temperature 0"),
    "encoder_repetition_penalty": Refused((1, 1.0)),
    "epsilon_cutoff": Refused((0, 0.0)),
    "eta_cutoff": Refused((0, 0.0)),
    "no_repeat_ngram_size": Refused((0,)),
    "num_beams": Refused((1,)),
    "num_return_sequences": Refused((1,), "n"),
    "penalty_alpha": Refused((0, 0.0)),
    "return_full_text": Refused((False,), "echo"),
    "stop_sequences": Refused(([],), "stop"),
    "stop_strings": Refused(([],), "stop"),
    "suppress_tokens": Refused(([],), "logit_bias"),
    "tfs_z": Refused((1, 1.0)),
    "tool_prompt": Refused(),
    "top_a": Refused((0, 0.0)),
    "top_n_tokens": Refused((0,), "top_logprobs"),
    "truncate": Refused((), "a shorter prompt"),
    "watermark": Refused((False,)),
    # Ollama, Fireworks, Together, OpenRouter, and what clients put at the top by mistake
    "context_length_exceeded_behavior": Refused(("error",)),
    "enable_thinking": Refused((), "chat_template_kwargs"),
    "format": Refused((), "response_format"),
    "models": Refused(([],)),
    "options": Refused(({},)),
    "prompt_truncate_len": Refused((), "a shorter prompt"),
    "reasoning": Refused(({},), "chat_template_kwargs"),
    "response_schema": Refused((), "response_format"),
    "routing_matrix_format": Refused(("base64_inline",)),
    "think": Refused((), "chat_template_kwargs"),
    "thinking": Refused((), "chat_template_kwargs"),
    "transforms": Refused(([],)),
}
