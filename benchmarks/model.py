"""The models that everything is measured on: random bf16 weights of published shapes, made here, never downloaded.

    python -m benchmarks.model             # Qwen3-0.6B's shape: made if need be; prints its folder
    python -m benchmarks.model hybrid      # Qwen3.5-0.8B's: three of four layers a gated delta rule

Speed does not depend on the weights' values, but for one thing: random weights give nearly flat logits, so a top-p
nucleus is most of the vocabulary. That is the worst case of every sampler; a trained model is kinder to all.
"""

from __future__ import annotations

import os
import sys
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
# The same vocabulary and width: what differs is the layers
HYBRID_SHAPE: Mapping[str, Any] = {
    **{key: value for key, value in SHAPE.items() if key != "rope_theta"},
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
NAME, HYBRID = "qwen3-0.6b-random", "qwen3.5-0.8b-random"
SEED = 0


def cache_folder() -> Path:
    """Outside the repository: 1.2 GB that git, linters and searches should never meet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "myserve-benchmarks"


def model_folder(name: str = NAME) -> Path:
    """Return the model's folder, in the hub's format; written on the first call (about a minute)."""
    folder = cache_folder() / name
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(folder, name)
        write_tokenizer(folder)
        (folder / "complete").touch()  # last: an interrupted run starts over
    return folder


def _write_weights(folder: Path, name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    kind, shape = {NAME: ("qwen3", SHAPE), HYBRID: ("qwen3_5_text", HYBRID_SHAPE)}[name]
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.bfloat16)
    # top_k 0: transformers would otherwise filter by its own default of 50.
    model.generation_config = GenerationConfig(
        bos_token_id=256, eos_token_id=256, pad_token_id=256, do_sample=True, top_k=0
    )
    model.save_pretrained(folder)


def write_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
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
    vocab |= {f"Ġ{i:x}": i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Q", "z")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token=None)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)


if __name__ == "__main__":
    print(model_folder(HYBRID if sys.argv[1:] == ["hybrid"] else NAME))
