"""Ids to text, one at a time: never half a character, never a piece of a stop string, always in step with the tokens.

What is released is final. A token is released together with the last of its text, so the texts of the deltas joined
are the text of the released tokens joined, and a stream reads as the same call unstreamed.
"""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass

from myserve.core.params import SamplingParams
from myserve.core.stopping import StopMatcher
from myserve.engine.outputs import TokenOutput
from myserve.engine.token_bytes import TokenBytes

UNKNOWN = -1  # where a token ends whose last character is not complete yet


@dataclass(frozen=True, slots=True)
class ReleasedText:
    """What became final: text with its tokens, and at the end the tokens that have no text in the output."""

    text: str = ""
    tokens: tuple[TokenOutput, ...] = ()
    stop_tokens: tuple[TokenOutput, ...] = ()
    matched: str | None = None  # the stop string that ended it


class Detokenizer:
    """One completion's text. `feed` every token, `end` once; after a match nothing more is to be fed."""

    def __init__(self, table: TokenBytes, params: SamplingParams) -> None:
        self._table = table
        self._hidden = table.special_ids if params.skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(params.stop)
        self._shows_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held: deque[tuple[TokenOutput, int]] = deque()  # tokens and the character at which each ends
        self._decoded = 0  # characters decoded so far
        self._safe = 0  # characters that no stop string can take back
        self._given = 0  # characters released
        self._text = ""  # the characters from _given to _safe

    def feed(self, token: TokenOutput) -> ReleasedText:
        """Take the next token; give what is final by now."""
        self._num_tokens += 1
        data = b"" if token.token_id in self._hidden else self._table[token.token_id]
        text = self._decoder.decode(data)
        self._decoded += len(text)
        self._held.append((token, UNKNOWN))
        if not self._decoder.getstate()[0]:
            self._settle_ends()
        matched = None
        if self._num_tokens > self._min_tokens:
            matched = self._scan(text)
        else:  # it may not stop yet, so its text is never scanned
            self._pass(text)
        return self._release_all(matched) if matched is not None else self._release_whole_tokens()

    def end(self, stop_token: TokenOutput | None = None) -> ReleasedText:
        """The completion is over: give what was held back. `stop_token` is an EOS or stop id, which has no text."""
        tail = self._decoder.decode(b"", final=True)  # half a character becomes U+FFFD
        self._decoded += len(tail)
        self._settle_ends()
        matched = self._scan(tail)
        if matched is None:
            self._pass(self._matcher.flush())
        released = self._release_all(matched)
        stop_tokens = released.stop_tokens + ((stop_token,) if stop_token else ())
        return ReleasedText(released.text, released.tokens, stop_tokens, matched)

    def _scan(self, text: str) -> str | None:
        """Let the text through up to what may be the beginning of a stop string; the one that ends it, if one does."""
        safe, matched = self._matcher.feed(text)
        self._pass(safe + matched if matched is not None and self._shows_stop else safe)
        return matched

    def _pass(self, text: str) -> None:
        """This much can no longer change."""
        self._text += text
        self._safe += len(text)

    def _settle_ends(self) -> None:
        """No character is pending, so every held token whose end was open ends here."""
        for i in range(len(self._held) - 1, -1, -1):
            token, end = self._held[i]
            if end != UNKNOWN:
                break
            self._held[i] = (token, self._decoded)

    def _release_whole_tokens(self) -> ReleasedText:
        tokens: list[TokenOutput] = []
        upto = self._given
        while self._held and UNKNOWN != self._held[0][1] <= self._safe:
            token, upto = self._held.popleft()
            tokens.append(token)
        return ReleasedText(self._take(upto), tuple(tokens))

    def _release_all(self, matched: str | None) -> ReleasedText:
        """Everything safe goes out; a token that begins behind it has no text in the output."""
        tokens: list[TokenOutput] = []
        stop_tokens: list[TokenOutput] = []
        start = self._given
        for token, end in self._held:
            ended_before = matched is not None and start >= self._safe
            (stop_tokens if ended_before else tokens).append(token)
            start = self._decoded if end == UNKNOWN else end
        self._held.clear()
        return ReleasedText(self._take(self._safe), tuple(tokens), tuple(stop_tokens), matched)

    def _take(self, upto: int) -> str:
        n = upto - self._given
        text, self._text = self._text[:n], self._text[n:]
        self._given = upto
        return text
