"""The bytes of every token id, proved at load against the tokenizer's own decoding; text is a view of them."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from myserve.engine.token_bytes.readers import (
    ByteRunReader,
    OwnReader,
    Reader,
    Utf8Reader,
    hold_cleaned,
    hold_everything,
    hold_halves,
)
from myserve.engine.token_bytes.spellings import (
    BYTE_FALLBACK,
    spell_byte_level,
    spell_latin1,
    spell_plain,
    spell_sentencepiece,
)

__all__ = ["TokenBytes"]

logger = logging.getLogger("myserve.engine")

# The proof reads all ids in order and MIXED_IDS of them mixed, in lists of LIST_TOKENS, longer than a reader's window.
LIST_TOKENS, MIXED_IDS = 192, 30_000
# An own decoding costs a call a token, so it is tried on this many.
OWN_IDS = 4_000
# A tokenizer written in Python decodes some 100,000 tokens a second: of a large vocabulary it is asked this many.
MAX_PYTHON_IDS = 20_000
# Ids whose bytes may be taken from their decoding, as a part of all: where more are wrong, the spelling is another.
MAX_REPAIRED = 0.02
# Bytes of text that one token is taken to stand for, where it may be any number.
UNBOUNDED = 1024
# What a tokenizer is asked to encode, so that the proof has lists as they really come.
SAMPLES = (
    "The quick brown fox doesn't jump over the lazy dog; it's 3.14 o'clock , isn't it ?",
    "naïve Übergröße señor čaj đem — данные, Ελληνικά العربية עברית हिन्दी ไทย 🦄👩‍👩‍👧",
    "日本語テキスト 你好，世界 한국어",
    'def f(x):\n    return {"a": [1, 2]}\t# done\n\n',
)


class TokenBytes(Sequence[bytes]):
    """`table[id]` is what token `id` adds behind other text, as bytes: half a character where it is half of one.

    At load the table is proved: text read from it is the tokenizer's own decoding, for all ids in two orders and for
    text. A tokenizer for which no table is right (WordPiece, `</w>`) has its text from its own decoding; then
    `is_bytewise` is False, and a token's bytes depend on its place. Ids that the tokenizer lacks are empty.

    The first token's space is kept, where the token has one: SentencePiece's decoder strips it, and `decode` does so.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        vocabulary = _TokenizerVocabulary(tokenizer, vocab_size)
        reading = _prove(vocabulary)
        self._decode = vocabulary.decode
        self._table = reading.table
        self._byte_ids = reading.byte_ids
        self._errors = reading.errors
        self._stable = reading.stable
        self._known = [token is not None for token in vocabulary.tokens]
        self._misread = vocabulary.misread
        self._keeps_letters = vocabulary.keeps_letters
        self.special_ids = vocabulary.special_ids

    @property
    def is_bytewise(self) -> bool:
        """True where a completion's text is its tokens' bytes, joined."""
        return self._stable is None

    @cached_property
    def longest(self) -> int:
        """Return the bytes of text that one token stands for at most: a text of more times the context cannot fit it.

        Where letters may be unknown or dropped, one token stands for any text, and this is UNBOUNDED.
        """
        longest = max(map(len, self._table), default=1) or 1
        is_complete = len({data for data in self._table if len(data) == 1}) == 256
        return longest if is_complete and self._keeps_letters else max(longest, UNBOUNDED)

    def __repr__(self) -> str:
        if self._stable is not None:
            return (
                f"TokenBytes({len(self)} ids, text by the tokenizer's own decoding, {self._stable.__name__})"
            )
        return f"TokenBytes({len(self)} ids, {len(self._byte_ids)} of byte runs, errors {self._errors})"

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, token_id: Any) -> Any:
        return self._table[token_id]

    def reader(self, *, skip_special_tokens: bool = True, shown_ids: Iterable[int] = ()) -> Reader:
        """Return a reader for one completion's ids; `shown_ids` are special tokens that it does not skip."""
        hidden = self.special_ids.difference(shown_ids) if skip_special_tokens else frozenset[int]()
        if self._stable is None:
            return self.bytes_reader(hidden)
        # ids that the tokenizer lacks have no text, and some decodings raise on them
        hidden = hidden | {i for i, known in enumerate(self._known) if not known}
        return OwnReader(self._decode_one, hidden, self._stable)

    def bytes_reader(self, hidden: Set[int] = frozenset()) -> Utf8Reader | ByteRunReader:
        """Return a reader of tokens' bytes alone."""
        if self._byte_ids:
            return ByteRunReader(self._table, hidden, self._byte_ids)
        return Utf8Reader(self._table, hidden, self._errors)

    def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a completion's ids: what its stream reads as."""
        reader = self.reader(skip_special_tokens=skip_special_tokens)
        return "".join([*(reader.feed(i) for i in token_ids), reader.end()])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids that are a whole text, as the tokenizer's own `decode` does.

        One exception: an added token that the tokenizers library reads by the byte alphabet (`đem` as `\\x11em`) has
        its own text.
        """
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        size = len(self._known)  # a tokenizer may have more ids than the model
        shown = [i for i in token_ids if i < size and self._known[i] and i not in hidden]
        if self._misread and not self._misread.isdisjoint(shown):
            return self.text(shown, skip_special_tokens=False)
        return self._decode_one(shown)

    def places(
        self, token_ids: Sequence[int], shown: str, *, skip_special_tokens: bool = True
    ) -> list[tuple[int, bytes | None]]:
        """Return where in `shown` each id begins, and its bytes there where these are not the table's.

        `shown` is the ids' text, however begun or cut: a text that was sent has no BOS, and no space that the
        tokenizer put before it; the token with that space is there without it.
        """
        reader = self.reader(skip_special_tokens=skip_special_tokens)
        begins, parts = [], []
        for token_id in token_ids:
            begins.append(reader.position(token_id, self._table[token_id]))
            parts.append(reader.feed(token_id))
        read = "".join([*parts, reader.end()])
        shift = max(0, read.find(shown) if shown in read else len(read) - len(shown))
        begins = [min(max(0, begin - shift), len(shown)) for begin in begins]
        ends = [*begins[1:], len(shown)]
        here = zip(token_ids, begins, ends, strict=True)
        return [(begin, self._bytes_here(i, shown, begin, end)) for i, begin, end in here]

    def _bytes_here(self, token_id: int, shown: str, begin: int, end: int) -> bytes | None:
        if not self.is_bytewise:
            return shown[begin:end].encode()
        data = self._table[token_id]
        has_lost_its_space = begin == 0 and data.startswith(b" ") and not shown.startswith(" ")
        return data.lstrip(b" ") if has_lost_its_space else None

    def _decode_one(self, token_ids: list[int]) -> str:
        return self._decode([token_ids])[0]


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way to read a vocabulary; `stable` is None where its text is the bytes of `table`, joined."""

    table: list[bytes]
    errors: str = "replace"
    byte_ids: frozenset[int] = frozenset()
    stable: Callable[[str], str] | None = None

    def bytes_reader(self) -> Reader:
        if self.byte_ids:
            return ByteRunReader(self.table, frozenset(), self.byte_ids)
        return Utf8Reader(self.table, frozenset(), self.errors)

    def read(self, token_ids: Sequence[int]) -> str:
        """Return the text of whole ids, in one go where a go is enough."""
        if self.byte_ids:
            return _read(self.bytes_reader(), token_ids)
        return b"".join([self.table[i] for i in token_ids]).decode("utf-8", self.errors)


class _TokenizerVocabulary:
    """Read off a tokenizer what a proof needs: every token's spelling, and decoding of many lists at once."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.is_python = self._backend is None
        self._decodes_in_rust = not self.is_python and _has_plain_decoding(tokenizer)
        self.tokens = [self._token(i) for i in range(vocab_size)]
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i < vocab_size}
        self.added = {i: str(token) for i, token in added.items()}
        named = tokenizer.all_special_ids if self.is_python else ()
        self.special_ids = frozenset(i for i in named if i < vocab_size) or frozenset(
            i for i, token in added.items() if token.special
        )
        # tokenizers' byte-level decoder reads an added token's é as a byte (huggingface/tokenizers#1392)
        is_byte_level = self._backend is not None and "ByteLevel(" in repr(self._backend.decoder)
        self.misread = frozenset(
            i for i, text in self.added.items() if is_byte_level and spell_byte_level(text) != text.encode()
        )
        parts = re.findall(r"[A-Z]\w+(?=\()", repr(getattr(self._backend, "normalizer", None)))
        self.keeps_letters = set(parts) <= {"Sequence", "Replace", "Prepend", "String"}

    def ids(self) -> list[int]:
        """Return the ids that a proof asks about, in order."""
        known = [i for i, token in enumerate(self.tokens) if token is not None and i not in self.misread]
        if not self.is_python or len(known) <= MAX_PYTHON_IDS:
            return known
        return known[:: -(-len(known) // MAX_PYTHON_IDS)]

    def decode(self, lists: list[list[int]]) -> list[str]:
        """Return each list's text, special tokens included, as `tokenizer.decode` gives it."""
        if self._decodes_in_rust:
            texts: list[str] = self._backend.decode_batch(lists, skip_special_tokens=False)
            return texts
        return [self._tokenizer.decode(ids, skip_special_tokens=False) for ids in lists]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text as users write it, those that a proof may ask about."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        except (
            Exception
        ):  # as some vocabularies raise for a word that they lack; the other lists prove enough
            return []
        size = len(self.tokens)
        return [i for i in ids if i < size and self.tokens[i] is not None and i not in self.misread]

    def _token(self, token_id: int) -> str | bytes | None:
        if not self.is_python:
            token: str | None = self._backend.id_to_token(token_id)
            return token
        try:  # a padded vocabulary has ids that a tokenizer in Python may not know
            own: str | bytes | None = self._tokenizer.convert_ids_to_tokens([token_id])[0]
            self._tokenizer.decode([token_id])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            return None
        return own


def _prove(vocabulary: _TokenizerVocabulary) -> _Reading:
    """Return the first reading that agrees with the tokenizer's own decoding everywhere it is asked."""
    context = _context(vocabulary)
    for reading in _bytewise_readings(vocabulary):
        repaired = _repaired(vocabulary, reading, context)
        if repaired is not None and _agrees(vocabulary, repaired.bytes_reader, context):
            return repaired
    table = [data.encode() for data in _behind(vocabulary, context, range(len(vocabulary.tokens)))]
    as_decoded = _Reading(table)
    # a space between tokens is none of a token's: the first of a text must have its bytes too
    if all(_agrees(vocabulary, as_decoded.bytes_reader, start) for start in (context, [])):
        return as_decoded
    for stable in (hold_halves, hold_cleaned):
        if _agrees(vocabulary, partial(_own_reader, vocabulary, stable), [], OWN_IDS):
            return _Reading(table, stable=stable)
    logger.warning(
        "the tokenizer's decoding follows no rule that is known: text comes when a completion ends"
    )
    return _Reading(table, stable=hold_everything)


def _bytewise_readings(vocabulary: _TokenizerVocabulary) -> Iterator[_Reading]:
    """Return the families whose tokens have bytes, each with its way to read bytes that are no UTF-8."""
    yield _Reading(_spelled(vocabulary, spell_byte_level))
    pieces = _spelled(vocabulary, spell_sentencepiece)
    byte_ids = frozenset(
        i
        for i, token in enumerate(vocabulary.tokens)
        if isinstance(token, str) and BYTE_FALLBACK.fullmatch(token)
    )
    yield _Reading(pieces, byte_ids=byte_ids)
    yield _Reading(pieces)
    for errors in ("ignore", "replace"):
        yield _Reading(_spelled(vocabulary, spell_latin1), errors)
    yield _Reading(_spelled(vocabulary, spell_plain))


def _spelled(vocabulary: _TokenizerVocabulary, spell: Callable[[str], bytes]) -> list[bytes]:
    table = [
        token if isinstance(token, bytes) else b"" if token is None else spell(token)
        for token in vocabulary.tokens
    ]
    if spell is spell_byte_level:
        for token_id in vocabulary.misread:
            table[token_id] = vocabulary.added[token_id].encode()
    return table


def _repaired(vocabulary: _TokenizerVocabulary, reading: _Reading, context: list[int]) -> _Reading | None:
    """Return the reading with the few ids mended whose decoding is not their spelling; None if they are many."""
    ids = vocabulary.ids()
    limit = int(len(ids) * MAX_REPAIRED)
    table = list(reading.table)
    wrong = 0
    lists = [ids[start : start + LIST_TOKENS] for start in range(0, len(ids), LIST_TOKENS)]
    for part in _lists_that_differ(vocabulary, reading.read, context, lists):
        alone = dict(zip(part, _behind(vocabulary, context, part), strict=True))
        for token_id, text in alone.items():
            if reading.read([token_id]) != text:
                table[token_id] = text.encode()
                wrong += 1
        if wrong > limit:
            return None
    byte_ids = frozenset(i for i in reading.byte_ids if table[i] == reading.table[i])
    return _Reading(table, reading.errors, byte_ids)


def _agrees(
    vocabulary: _TokenizerVocabulary,
    new_reader: Callable[[], Reader],
    context: list[int],
    limit: int = MIXED_IDS,
) -> bool:
    """Return whether readers give the tokenizer's own text behind `context`, for ids of all kinds and the samples'."""
    ids = vocabulary.ids()
    mixed = random.Random(0).choices(ids, k=min(len(ids), limit)) if ids else []
    lists = [mixed[start : start + LIST_TOKENS] for start in range(0, len(mixed), LIST_TOKENS)]
    lists += [vocabulary.encode(text) for text in SAMPLES]
    differing = _lists_that_differ(vocabulary, lambda some: _read(new_reader(), some), context, lists)
    return next(differing, None) is None


def _lists_that_differ(
    vocabulary: _TokenizerVocabulary,
    read: Callable[[list[int]], str],
    context: list[int],
    lists: list[list[int]],
) -> Iterator[list[int]]:
    """Yield the lists whose text, behind `context`, is not what `read` makes of them; a few are asked at a time."""
    before = vocabulary.decode([context])[0] if context else ""
    start, count = 0, 1  # few at first: most readings are wrong at once
    while start < len(lists):
        some = lists[start : start + count]
        start, count = start + count, 64
        for ids, whole in zip(some, vocabulary.decode([context + ids for ids in some]), strict=True):
            if whole != before + read(ids):
                yield ids


def _read(reader: Reader, ids: Sequence[int]) -> str:
    return "".join([*map(reader.feed, ids), reader.end()])


def _behind(vocabulary: _TokenizerVocabulary, context: list[int], ids: Sequence[int]) -> list[str]:
    """Return the text that each id adds behind `context`."""
    known = [i for i in ids if vocabulary.tokens[i] is not None]
    before = vocabulary.decode([context])[0] if context else ""
    added = dict.fromkeys(ids, "")
    for token_id, whole in zip(known, vocabulary.decode([[*context, i] for i in known]), strict=True):
        added[token_id] = whole.removeprefix(before)
    for token_id in vocabulary.misread & added.keys():
        added[token_id] = vocabulary.added[token_id]
    return [added[i] for i in ids]


def _context(vocabulary: _TokenizerVocabulary) -> list[int]:
    """Return an id of letters: behind it, what a decoder does to the first token does not show.

    No byte token: the one behind it may be of its run.
    """
    for token_id, token in enumerate(vocabulary.tokens):
        is_byte = isinstance(token, str) and BYTE_FALLBACK.fullmatch(token)
        if token and not is_byte and token_id not in vocabulary.added:
            text = vocabulary.decode([[token_id]])[0]
            if text.isascii() and text.isalpha():
                return [token_id]
    return []


def _own_reader(vocabulary: _TokenizerVocabulary, stable: Callable[[str], str]) -> Reader:
    return OwnReader(lambda ids: vocabulary.decode([ids])[0], frozenset(), stable)


def _has_plain_decoding(tokenizer: Any) -> bool:
    """Return whether `tokenizer.decode` is its Rust part's, and nothing is cleaned up afterwards."""
    kind = type(tokenizer)
    is_inherited = getattr(kind, "_decode", None) is getattr(_fast_base(kind), "_decode", None)
    cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    return is_inherited and not (cleans and not _is_bpe(tokenizer))


def _fast_base(kind: type) -> type | None:
    """Return transformers' class of tokenizers in Rust, among the bases of `kind`."""
    return next((base for base in kind.__mro__ if base.__name__ == "TokenizersBackend"), None)


def _is_bpe(tokenizer: Any) -> bool:
    """transformers cleans up no BPE, unless the tokenizer insists."""
    insists = getattr(
        tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False
    )
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not insists
