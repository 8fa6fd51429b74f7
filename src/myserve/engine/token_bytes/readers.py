"""Readers turn ids into text, one at a time: what they have returned is final, and joined it is the text of all ids."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Set
from typing import Protocol

__all__ = [
    "ByteRunReader",
    "OwnReader",
    "Reader",
    "Utf8Reader",
    "hold_cleaned",
    "hold_everything",
    "hold_halves",
]

REPLACEMENT = "\ufffd"

# Tokens after which an OwnReader forgets all but the last KEPT_TOKENS: each decoding stays short. That no more context
# is needed is proved at load, on sequences longer than this.
WINDOW_TOKENS, KEPT_TOKENS = 32, 8


# What transformers' clean_up_tokenization shortens, and what it shortens first to one of these.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " n ' t", " 'm", " 's", " 've", " 're")


class Reader(Protocol):
    """The text of one list of ids, read as the ids come."""

    @property
    def pending(self) -> bool:
        """True where text of an id that was fed is still held back."""
        ...

    def feed(self, token_id: int) -> str:
        """Take the next id; return the text that is final now."""
        ...

    def end(self) -> str:
        """Return what was held back: no more ids come."""
        ...

    def position(self, token_id: int, data: bytes) -> int:
        """Return the character at which the text of `token_id`, whose bytes are `data`, would begin if it came next."""
        ...


class Table(Protocol):
    """Each id's bytes."""

    def __getitem__(self, token_id: int, /) -> bytes: ...


class Utf8Reader:
    """Joins the bytes of tokens and decodes them as UTF-8; `errors` is "replace" or "ignore".

    >>> reader = Utf8Reader([b"\\xc3", b"\\xa9", b"!"], frozenset(), "replace")
    >>> reader.feed(0), reader.position(1, b"\\xa9"), reader.position(2, b"!"), reader.feed(1)
    ('', 0, 1, 'é')
    >>> reader.feed(0), reader.end()
    ('', '\ufffd')
    """

    def __init__(self, table: Table, hidden: Set[int], errors: str) -> None:
        self._table = table
        self._hidden = hidden
        self._replaces = errors == "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._count = 0  # characters returned
        self.pending = False

    def feed(self, token_id: int) -> str:
        return self.take(token_id, b"" if token_id in self._hidden else self._table[token_id])

    def take(self, token_id: int, data: bytes) -> str:
        """Feed a token whose bytes are `data`."""
        text = self._decoder.decode(data)
        self._count += len(text)
        if data:
            self.pending = data[-1] >= 0x80 and bool(self._decoder.getstate()[0])
        return text

    def end(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._count += len(text)
        self.pending = False
        return text

    def position(self, token_id: int, data: bytes) -> int:
        breaks_off = self._replaces and self.pending and bool(data) and data[0] & 0xC0 != 0x80
        return self._count + breaks_off


class ByteRunReader:
    """Reads byte tokens as SentencePiece's decoder does: a run of them is UTF-8 as a whole, or U+FFFD for each.

    So a run is held back until another token ends it: one wrong byte at its end changes all of it.

    >>> reader = ByteRunReader([b"\\xc3", b"\\xa9", b" a"], frozenset(), frozenset({0, 1}))
    >>> reader.feed(0), reader.feed(1), reader.feed(2), reader.feed(1), reader.feed(0), reader.end()
    ('', '', 'é a', '', '', '\ufffd\ufffd')
    """

    def __init__(self, table: Table, hidden: Set[int], byte_ids: Set[int]) -> None:
        self._table = table
        self._hidden = hidden
        self._byte_ids = byte_ids
        self._run = bytearray()
        self._count = 0  # characters returned

    @property
    def pending(self) -> bool:
        return bool(self._run)

    def feed(self, token_id: int) -> str:
        return self.take(token_id, b"" if token_id in self._hidden else self._table[token_id])

    def take(self, token_id: int, data: bytes) -> str:
        """Feed a token whose bytes are `data`."""
        if not data:
            return ""
        if token_id in self._byte_ids:
            self._run += data
            return ""
        text = self._read_run() + data.decode("utf-8", "replace")
        self._run.clear()
        self._count += len(text)
        return text

    def end(self) -> str:
        text = self._read_run()
        self._run.clear()
        self._count += len(text)
        return text

    def position(self, token_id: int, data: bytes) -> int:
        if not data or token_id in self._byte_ids:  # it may be inside a character
            return self._count + len(self._run.decode("utf-8", "ignore"))
        return self._count + len(self._read_run())

    def _read_run(self) -> str:
        try:
            return self._run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(self._run)


class OwnReader:
    """Reads with the tokenizer's own decoding of all ids, and returns what `stable` says no later id can change.

    For tokenizers whose tokens have no bytes of their own: WordPiece puts a space between words, `</w>` one behind a
    word that is not the last.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], hidden: Set[int], stable: Callable[[str], str]
    ) -> None:
        self._decode = decode
        self._hidden = hidden
        self._stable = stable
        self._ids: list[int] = []  # the window: the last ids that were fed
        self._returned = ""  # of the window's text
        self._held = 0  # characters of the window's text behind that
        self._count = 0  # characters returned
        self._pending = False

    @property
    def pending(self) -> bool:
        return self._pending

    def feed(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        if self._stable is hold_everything:
            self._pending = True
            return ""
        whole = self._decode(self._ids)
        stable = self._stable(whole)
        self._pending = len(whole) > len(stable) or not stable.startswith(self._returned)
        if not stable.startswith(self._returned):
            return ""
        text = stable[len(self._returned) :]
        self._returned, self._held = stable, len(whole) - len(stable)
        self._count += len(text)
        if not self._pending and len(self._ids) > WINDOW_TOKENS:
            self._ids = self._ids[-KEPT_TOKENS:]
            self._returned = self._decode(self._ids)
        return text

    def end(self) -> str:
        whole = self._decode(self._ids)
        text = whole[len(self._returned) :]
        self._returned, self._held, self._pending = whole, 0, False
        self._count += len(text)
        return text

    def position(self, token_id: int, data: bytes) -> int:
        return self._count + self._held


def hold_halves(text: str) -> str:
    """Hold back U+FFFD at the end: a character may be half there.

    >>> hold_halves("a\ufffd")
    'a'
    """
    return text.rstrip(REPLACEMENT)


def hold_cleaned(text: str) -> str:
    """Hold back also what may begin something that `clean_up_tokenization_spaces` shortens, such as " n't".

    >>> hold_cleaned("I do n '"), hold_cleaned("I do not")
    ('I do', 'I do not')
    """
    text = text.rstrip(REPLACEMENT)
    for length in range(max(map(len, _CLEANED)) - 1, 0, -1):
        if any(len(part) > length and part.startswith(text[-length:]) for part in _CLEANED):
            return text[:-length]
    return text


def hold_everything(text: str) -> str:
    """Hold back all of it: nothing is known of this decoder."""
    return ""
