"""Tiny random models, dense and mixture of experts, with a tokenizer that is complete over bytes; made in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = ["EOS", "MODELS", "VOCAB_SIZE", "byte_level_tokenizer", "make_models", "write_model"]

VOCAB_SIZE, EOS = 320, 2
CONTEXT = 128
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DENSE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # random, but not flat: the argmax and the nucleus mean something
}
_MOE: dict[str, object] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [],
}
MODELS: dict[str, tuple[str, dict[str, object]]] = {"dense": ("llama", {}), "moe": ("qwen3_moe", _MOE)}


def make_models(folder: Path) -> dict[str, Path]:
    """Write each of MODELS below `folder`; return where."""
    return {
        name: write_model(folder / name, architecture, **shape)
        for name, (architecture, shape) in MODELS.items()
    }


def write_model(folder: Path, architecture: str, **shape: object) -> Path:
    """Write a random model and its tokenizer as `save_pretrained` does; return `folder`. `shape`: what is not usual."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(_DENSE | shape)))
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Train one of VOCAB_SIZE tokens, complete over bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ['the quick brown fox, one two three; naïve Übergröße 你好 🦄 {"a": [1, 2]}'], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        eos_token=special[2],
        pad_token=special[0],
        additional_special_tokens=special[1:2],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
