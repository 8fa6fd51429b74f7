"""Ids to text, one at a time: never half a character, never a piece of a stop string, always in step with the tokens.

What is released is final. A token is released together with the last of its text, so the texts of the deltas joined
are the text of the released tokens joined, and a stream reads as the same call unstreamed.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct
from msgspec.structs import replace

from myserve.core.params import SamplingParams
from myserve.core.stopping import StopMatcher
from myserve.engine.outputs import TokenOutput
from myserve.engine.token_bytes import TokenBytes

__all__ = ["Detokenizer", "ReleasedText"]

UNKNOWN = -1  # where a token ends whose last character is not complete yet


class ReleasedText(Struct, frozen=True):
    """Text that became final, with its tokens; at the end also the tokens that have no text in the output."""

    text: str = ""
    tokens: tuple[TokenOutput, ...] = ()
    stop_tokens: tuple[TokenOutput, ...] = ()
    matched: str | None = None  # the stop string that ended it


class Detokenizer:
    """Turns one completion's ids into text. `feed` every token, `end` once; after a match feed nothing more.

    Where a token's bytes depend on its place (`TokenBytes.is_bytewise` is False), it gets those that it has here.
    """

    def __init__(self, table: TokenBytes, params: SamplingParams) -> None:
        self._reader = table.reader(
            skip_special_tokens=params.skip_special_tokens, shown_ids=params.shown_special_ids
        )
        self._sets_bytes = not table.is_bytewise
        self._matcher = StopMatcher(params.stop)
        # no stop string can hold a text back, and each token's bytes are the table's
        self._is_plain = not params.stop and table.is_bytewise
        self._shows_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held: deque[tuple[TokenOutput, int]] = deque()  # tokens and the character at which each ends
        self._decoded = 0  # characters decoded so far
        self._safe = 0  # characters that no stop string can take back
        self._given = 0  # characters released
        self._text = ""  # the characters from _given to _safe

    def feed(self, token: TokenOutput) -> ReleasedText:
        """Take the next token; return what is final by now."""
        self._num_tokens += 1
        text = self._reader.feed(token.token_id)
        self._decoded += len(text)
        if self._is_plain and not self._held and not self._reader.pending:
            # nearly every token: whole characters behind whole characters
            self._safe = self._given = self._decoded
            return ReleasedText(text, (token,))
        self._held.append((token, UNKNOWN))
        if not self._reader.pending:
            self._settle_ends()
        matched = None
        if self._num_tokens > self._min_tokens:
            matched = self._scan(text)
        else:  # it may not stop yet, so its text is never scanned
            self._pass(text)
        return self._release_all(matched) if matched is not None else self._release_whole_tokens()

    def end(self, stop_token: TokenOutput | None = None) -> ReleasedText:
        """Return what was held back: the completion is over. `stop_token` is an EOS or stop id, which has no text."""
        tail = self._reader.end()  # half a character becomes U+FFFD
        self._decoded += len(tail)
        self._settle_ends()
        matched = self._scan(tail)
        if matched is None:
            self._pass(self._matcher.flush())
        released = self._release_all(matched)
        stop_tokens = released.stop_tokens + ((stop_token,) if stop_token else ())
        return ReleasedText(released.text, released.tokens, stop_tokens, matched)

    def _scan(self, text: str) -> str | None:
        """Pass the text up to what may begin a stop string; return the stop string that ends it, if one does."""
        safe, matched = self._matcher.feed(text)
        self._pass(safe + matched if matched is not None and self._shows_stop else safe)
        return matched

    def _pass(self, text: str) -> None:
        """Add text that can no longer change."""
        self._text += text
        self._safe += len(text)

    def _settle_ends(self) -> None:
        """End every held token whose end was open here: no character is pending."""
        for i in range(len(self._held) - 1, -1, -1):
            token, end = self._held[i]
            if end != UNKNOWN:
                break
            self._held[i] = (token, self._decoded)

    def _release_whole_tokens(self) -> ReleasedText:
        tokens: list[TokenOutput] = []
        upto = self._given
        while self._held and UNKNOWN != self._held[0][1] <= self._safe:
            start = upto
            token, upto = self._held.popleft()
            tokens.append(self._with_bytes(token, start, upto) if self._sets_bytes else token)
        return ReleasedText(self._take(upto), tuple(tokens))

    def _release_all(self, matched: str | None) -> ReleasedText:
        """Release all that is safe; a token that begins behind it has no text in the output."""
        tokens: list[TokenOutput] = []
        stop_tokens: list[TokenOutput] = []
        start = self._given
        for token, end in self._held:
            end = self._decoded if end == UNKNOWN else end
            if self._sets_bytes:
                token = self._with_bytes(token, start, end)
            ended_before = matched is not None and start >= self._safe
            (stop_tokens if ended_before else tokens).append(token)
            start = end
        self._held.clear()
        return ReleasedText(self._take(self._safe), tuple(tokens), tuple(stop_tokens), matched)

    def _with_bytes(self, token: TokenOutput, start: int, end: int) -> TokenOutput:
        """Return the token with the bytes of its text, which is not released yet."""
        text = self._text[start - self._given : end - self._given]
        return replace(token, text_bytes=text.encode())

    def _take(self, upto: int) -> str:
        n = upto - self._given
        text, self._text = self._text[:n], self._text[n:]
        self._given = upto
        return text
