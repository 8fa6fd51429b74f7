"""The tokenizer of a GGUF file, its chat template included; a way to cut text that is not known is refused."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from myserve.engine.weights.formats.from_gguf.file import GgufFile
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = ["gguf_tokenizer"]

_PLAIN_SPLITS = ("default", "gpt-2", "gpt2", "mpt", "olmo")  # of one pattern in llama.cpp: GPT-2's


def gguf_tokenizer(file: GgufFile) -> Any:
    """Return transformers' tokenizer of a file, its chat template included. Raises BadCheckpointError."""
    # here, and not above: an older transformers has no such module, and serves all but GGUF
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = file.metadata.get("tokenizer.ggml.pre", "default")
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_PLAIN_SPLITS}
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and split not in known:
        # transformers would cut text as GPT-2 does, and give other tokens than the model was trained on
        raise UnsupportedModelError(
            f"{file.path.name} cuts text before its tokenizer by {split!r}, which is not read from GGUF: take the "
            "model's safetensors"
        )
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # transformers and tokenizers raise what the file makes them
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpointError(
            f"the tokenizer of {file.path.name} cannot be read: {type(error).__name__}: {reason}"
        ) from error
    if file.metadata.get("tokenizer.ggml.model") == "llama" and _puts_no_space_first(file):
        _put_no_space_first(tokenizer.backend_tokenizer)
    template = file.metadata.get("tokenizer.chat_template")
    if tokenizer.chat_template is None and isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _puts_no_space_first(file: GgufFile) -> bool:
    return file.metadata.get("tokenizer.ggml.add_space_prefix") is False


def _put_no_space_first(backend: Tokenizer) -> None:
    """Let a SentencePiece tokenizer begin a text as it is, which transformers reads from the file and passes over."""
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
