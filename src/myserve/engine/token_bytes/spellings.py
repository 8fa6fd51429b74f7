"""The spellings of bytes in vocabularies: each function turns a token into the bytes that it stands for."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["byte_level_alphabet", "spell_byte_level", "spell_latin1", "spell_plain", "spell_sentencepiece"]

BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def byte_level_alphabet() -> dict[str, int]:
    """Return the printable stand-ins of byte-level BPE: character -> byte.

    Bytes that print as themselves do; the other 68 stand at U+0100 and up, in order (Radford et al., 2019).

    >>> byte_level_alphabet()["A"], byte_level_alphabet()["Ġ"]
    (65, 32)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    hidden = [b for b in range(256) if b not in set(printable)]
    return alphabet | {chr(0x100 + n): b for n, b in enumerate(hidden)}


def spell_byte_level(token: str) -> bytes:
    """Read a token of byte-level BPE (GPT-2, Llama 3, Qwen, tekken); one with a foreign character is plain text.

    >>> spell_byte_level("Ġcaf"), spell_byte_level("<你>").decode()
    (b' caf', '<你>')
    """
    try:
        return token.translate(_bytes_of_stand_ins()).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def spell_sentencepiece(token: str) -> bytes:
    """Read a token of SentencePiece (Llama 2, Gemma, T5): `▁` is a space, `<0xNN>` a byte.

    >>> spell_sentencepiece("▁caf"), spell_sentencepiece("<0xC3>")
    (b' caf', b'\\xc3')
    """
    if match := BYTE_FALLBACK.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


def spell_latin1(token: str) -> bytes:
    """Read a token of the byte tokenizers (ByT5), whose character U+00NN is the byte 0xNN.

    >>> spell_latin1("Ã"), spell_latin1("<extra_id_0>")
    (b'\\xc3', b'<extra_id_0>')
    """
    return token.encode("latin-1") if len(token) == 1 and token <= "\xff" else token.encode()


def spell_plain(token: str) -> bytes:
    """Read a token that stands for itself.

    >>> spell_plain("a▁").decode()
    'a▁'
    """
    return token.encode()


@lru_cache(maxsize=1)
def _bytes_of_stand_ins() -> dict[int, int]:
    """Return a table for `str.translate`: stand-ins to bytes, other Latin 1 to what Latin 1 cannot encode."""
    alphabet = {ord(character): byte for character, byte in byte_level_alphabet().items()}
    return dict.fromkeys(range(256), 0x2603) | alphabet
