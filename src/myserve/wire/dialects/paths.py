"""The dialects' routes that change the server for everyone, and so want an admin key where there are keys."""

from __future__ import annotations

__all__ = ["ADMIN_PATHS", "LIVENESS", "TINKER", "TINKER_HEALTH", "TINKER_TRAINING"]

LIVENESS = "/liveness"

# whatever the method: SGLang takes some of them by GET too
ADMIN_PATHS = frozenset(
    {
        # vLLM
        "/pause",
        "/resume",
        "/abort_requests",
        "/inference/v1/abort_requests",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/weight_checker",
        "/reset_prefix_cache",
        "/sleep",
        "/wake_up",
        # SGLang
        "/pause_generation",
        "/continue_generation",
        "/abort_request",
        "/flush_cache",
        "/update_weights_from_disk",
        "/update_weights_from_tensor",
        "/update_weights_from_distributed",
        "/update_weights_from_ipc",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/weights_checker",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        # LoRA
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/skyrl/v1/load_lora_adapter",
        "/load_lora_adapter",
        "/unload_lora_adapter",
        # both
        "/update_weight_version",
    }
)

TINKER = "/api/v1"
TINKER_HEALTH = f"{TINKER}/healthz"

# what Tinker's client posts to train, and to move checkpoints: refused, for whatever key
TINKER_TRAINING = tuple(
    f"{TINKER}/{name}"
    for name in (
        "create_model",
        "copy_weights",
        "create_custom_loss",
        "forward",
        "forward_backward",
        "get_info",
        "load_weights",
        "optim_step",
        "save_weights",
        "save_weights_external",
        "save_weights_for_sampler",
        "unload_model",
        "weights_info",
    )
)
