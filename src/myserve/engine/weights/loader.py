"""A model from a path or a hub id, ready for packed batches; what cannot run so is refused with the reason."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from myserve.engine.batch_invariance import vml_warmup
from myserve.engine.config import EngineConfig
from myserve.engine.kernels.warm import warm
from myserve.engine.mixers import attention
from myserve.engine.weights.plan import WeightNames
from myserve.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, with its tokenizer and what generation needs to know of it."""

    model: Any  # transformers' PreTrainedModel; its own annotations do not survive strict checking
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int  # of the logits: padded vocabularies are wider than the tokenizer's
    device: torch.device
    weight_names: WeightNames
    casts: bool  # an explicit dtype: what has another is rounded to it, now and in every update


def load(model: str, config: EngineConfig) -> LoadedModel:
    """Load `model` with our attention in place of its own."""
    vml_warmup.initialize()
    attention.register_attention()
    device = torch.device(resolve_device(config.device))
    hf_config = AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    refuse_what_cannot_be_packed(hf_config)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if device.type == "cpu":  # while weights are read and packed: both leave Python to others
        half = torch.bfloat16 in (dtype, hf_config.dtype)
        threading.Thread(target=warm, args=(torch.bfloat16 if half else torch.float32,)).start()
    with ThreadPoolExecutor(1) as beside:
        tokenizer_coming = beside.submit(
            AutoTokenizer.from_pretrained, model, trust_remote_code=config.trust_remote_code
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=attention.ATTENTION_NAME,
        )
        tokenizer = tokenizer_coming.result()
    if not getattr(loaded, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{type(loaded).__name__} does not take its attention from transformers' AttentionInterface, so its "
            "requests cannot be batched exactly; models of the Llama, Qwen, Mistral, Gemma, GPT-2, OLMo and MoE "
            "kinds do"
        )
    loaded = loaded.eval().requires_grad_(False).to(device)
    return LoadedModel(
        model=loaded,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids(loaded, tokenizer),
        max_model_len=context_length(hf_config),
        vocab_size=loaded.get_output_embeddings().weight.shape[0],
        device=device,
        weight_names=WeightNames.of(loaded),
        casts=config.dtype != "auto",
    )


def resolve_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def refuse_what_cannot_be_packed(config: Any) -> None:
    """Refuse, by its config, a model whose state is not keys and values of a causal attention."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder; only causal models can be served"
        )
    known = {"full_attention", "sliding_attention"}
    strange = sorted(set(getattr(config, "layer_types", None) or known) - known)
    if strange:
        raise UnsupportedModelError(
            f"{config.model_type} has layers of type {', '.join(strange)}; the engine batches "
            "full and sliding-window attention alone"
        )


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every EOS id of the generation config; the tokenizer's where the config names none."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    if named is None:
        return ()
    return tuple(named) if isinstance(named, list | tuple) else (int(named),)


def context_length(config: Any) -> int:
    """How many positions the model was made for."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if length := getattr(config, name, None):
            return int(length)
    raise UnsupportedModelError(f"the config of {config.model_type} does not say how long a context may be")
