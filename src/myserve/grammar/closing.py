"""A short way from where a completion stands to its grammar's end: what makes `max_tokens` cut no object in two."""

from __future__ import annotations

from llguidance import LLMatcher

from myserve.grammar.compiler import Vocabulary

__all__ = ["Closer"]

MAX_PATH = 512  # tokens; a grammar that needs more from some state is not closed in time

# Which character to write first, where several may come. Whatever closes something comes before whatever goes on, and
# what goes on before what opens; so a JSON text is closed in about the fewest tokens, and most other texts too.
_ORDER = b'}])>"!?.;@,:/|&=~%^$#0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-[{(<'
_LAST = b" \t\r\n"


class Closer:
    """Finds endings for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        single: dict[int, int] = {}
        for token_id, data in enumerate(vocabulary.tokens):
            if len(data) == 1 and token_id not in vocabulary.special_ids:
                single.setdefault(data[0], token_id)
        rest = (byte for byte in range(256) if byte not in _ORDER + _LAST)
        # a grammar that names one has it between texts of any length, and nothing else ends those
        self._special = sorted(vocabulary.special_ids - {*vocabulary.eos_ids})
        self._quote, self._letter = single.get(ord('"')), single.get(ord("q"))
        self._preferred = [single[byte] for byte in (*_ORDER, *rest, *_LAST) if byte in single]

    def path(self, matcher: LLMatcher, limit: int = MAX_PATH) -> list[int] | None:
        """Tokens after which the text may end, at most `limit` of them; None if this way finds none.

        Consumes them from `matcher`, which should be a copy. It is a greedy walk, not a search: a grammar whose end
        lies behind a choice that it does not make has an end that is not found.
        """
        path: list[int] = []
        while not matcher.is_accepting():
            if len(path) >= min(limit, MAX_PATH):
                return None
            mask = matcher.compute_bitmask()
            if matcher.is_error() or matcher.is_stopped():
                return None
            token_id = self._choose(mask)
            if token_id is None or not matcher.consume_token(token_id):
                return None
            path.append(token_id)
        return path

    def _choose(self, mask: bytes) -> int | None:
        for token_id in self._special:
            if _has(mask, token_id):
                return token_id
        if self._is_in_string(mask):
            return self._quote
        for token_id in self._preferred:
            if _has(mask, token_id):
                return token_id
        # else a token of several characters that the grammar forces
        zeros = len(mask) - len(mask.lstrip(b"\0"))
        if zeros == len(mask):
            return None
        lowest = mask[zeros] & -mask[zeros]
        return 8 * zeros + lowest.bit_length() - 1

    def _is_in_string(self, mask: bytes) -> bool:
        """Return whether a string is open: a bracket is a letter there, and the quote is what closes."""
        quote, letter = self._quote, self._letter
        return quote is not None and letter is not None and _has(mask, quote) and _has(mask, letter)


def _has(mask: bytes, token_id: int) -> bool:
    return bool(mask[token_id >> 3] >> (token_id & 7) & 1)
