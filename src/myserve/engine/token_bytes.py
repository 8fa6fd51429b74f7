"""The true bytes of every token id, read off the vocabulary: text is decoded from these and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(Sequence[bytes]):
    """`table[id]` is what token `id` adds to the output, as bytes: half a character where the token is half of one.

    Three families are known by the tokenizer's own decoder: byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece
    (`▁` is a space, `<0xNN>` a byte: Llama 2, Gemma, Mistral), and anything else, whose tokens are decoded one by
    one. Ids that the model has and the tokenizer has not (padding of the vocabulary) are empty.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        spell = _speller(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
        self._table = [b"" if token is None else spell(token) for token in tokens]
        self._table += [b""] * (vocab_size - len(self._table))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, token_id: Any) -> Any:
        return self._table[token_id]

    def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of whole ids; bytes that are no UTF-8 become U+FFFD, as every decoder does it."""
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        return b"".join(self._table[i] for i in token_ids if i not in hidden).decode("utf-8", "replace")


@lru_cache(maxsize=1)
def byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: character -> byte.

    Bytes that print as themselves do; the other 68 stand at U+0100 and up, in order (Radford et al., 2019).

    >>> byte_level_alphabet()["A"], byte_level_alphabet()["Ġ"]
    (65, 32)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    hidden = [b for b in range(256) if b not in set(printable)]
    return alphabet | {chr(0x100 + n): b for n, b in enumerate(hidden)}


def _speller(tokenizer: Any) -> Callable[[str], bytes]:
    """Which family's spelling the vocabulary is written in."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
    if "ByteLevel" in decoder:
        return _spell_byte_level
    if "▁" in decoder or "\\u2581" in decoder or "Metaspace" in decoder:
        return _spell_sentencepiece
    return lambda token: tokenizer.convert_tokens_to_string([token]).encode()


def _spell_byte_level(token: str) -> bytes:
    """A token with a character outside the alphabet is an added one and stands for itself."""
    try:
        return token.translate(_bytes_of_stand_ins()).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


@lru_cache(maxsize=1)
def _bytes_of_stand_ins() -> dict[int, int]:
    """For `str.translate`: a stand-in to its byte; of Latin 1, what is no stand-in to what Latin 1 has not."""
    alphabet = {ord(character): byte for character, byte in byte_level_alphabet().items()}
    return dict.fromkeys(range(256), 0x2603) | alphabet


def _spell_sentencepiece(token: str) -> bytes:
    if match := _BYTE_FALLBACK.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()
