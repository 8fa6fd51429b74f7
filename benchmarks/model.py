"""The model that everything is measured on: Qwen3-0.6B's shape, random bf16 weights, made here, never downloaded.

    python -m benchmarks.model      # makes it if need be; prints its folder

Speed does not depend on the weights' values, but for one thing: random weights give nearly flat logits, so a top-p
nucleus is most of the vocabulary. That is the worst case of every sampler; a trained model is kinder to all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB_SIZE = 151_936
SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
NAME = "qwen3-0.6b-random"
SEED = 0


def cache_folder() -> Path:
    """Outside the repository: 1.2 GB that git, linters and searches should never meet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "myserve-benchmarks"


def model_folder() -> Path:
    """Return the model's folder, in the hub's format; written on the first call (about a minute)."""
    folder = cache_folder() / NAME
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(folder)
        _write_tokenizer(folder)
        (folder / "complete").touch()  # last: an interrupted run starts over
    return folder


def _write_weights(folder: Path) -> None:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, dtype="bfloat16"))
    finally:
        torch.set_default_dtype(torch.float32)
    # top_k 0: transformers would otherwise filter by its own default of 50.
    model.generation_config = GenerationConfig(
        bos_token_id=256, eos_token_id=256, pad_token_id=256, do_sample=True, top_k=0
    )
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE over the 256 bytes, padded to the vocabulary with plain words that no merge reaches.

    A token drawn at random is then whole ASCII text nearly always, so no server holds it back for half a character,
    and each token is an event of its own; and a text of P plain characters is a prompt of exactly P tokens, for the
    servers that take no ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    vocab |= {"<|endoftext|>": 256, "Qz": 257}  # llama.cpp refuses a vocabulary without a single merge
    vocab |= {f"Ġ{i:x}": i for i in range(len(vocab), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Q", "z")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token=None)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)


if __name__ == "__main__":
    print(model_folder())
