"""A thinking model's text is split in two, thought and answer; line breaks at the marks belong to the marks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from myserve.server.parsing.marks import held_back

__all__ = ["ThinkingReader", "thinking_tokens"]

START, END = "<think>", "</think>"


class _Part(Enum):
    BEFORE = "before"  # it may begin to think
    THOUGHT = "thought"
    GAP = "gap"  # behind the mark, before the answer
    ANSWER = "answer"


class ThinkingReader:
    """Splits one completion as its text comes. `begun`: the prompt ends behind the opening mark.

    >>> reader = ThinkingReader(begun=False)
    >>> reader.feed("<think>\\nHm.\\n</th"), reader.feed("ink>\\n\\nYes"), reader.end()
    (('Hm.', ''), ('', 'Yes'), ('', ''))
    """

    def __init__(self, *, begun: bool) -> None:
        self._part = _Part.THOUGHT if begun else _Part.BEFORE
        self._buffer = ""
        self._at_start = True  # of the thought: line breaks are the mark's

    def feed(self, text: str) -> tuple[str, str]:
        """Return (thought, answer), as far as they are known with this text."""
        self._buffer += text
        return self._read(final=False)

    def end(self) -> tuple[str, str]:
        """Return what was held back."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> tuple[str, str]:
        if self._part is _Part.BEFORE and not self._enter(final):
            return "", ""
        thought = self._thought(final) if self._part is _Part.THOUGHT else ""
        if self._part is _Part.GAP:
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._part = _Part.ANSWER
        if self._part is not _Part.ANSWER:
            return thought, ""
        answer, self._buffer = self._buffer, ""
        return thought, answer

    def _enter(self, final: bool) -> bool:
        """Return whether it is known by now if there is a thought."""
        start = self._buffer.lstrip()
        if start.startswith(START):
            self._buffer, self._part = start[len(START) :], _Part.THOUGHT
        elif START.startswith(start) and not final:
            return False
        else:
            self._part = _Part.ANSWER
        return True

    def _thought(self, final: bool) -> str:
        thought, mark, rest = self._buffer.partition(END)
        if mark:
            self._part, self._buffer = _Part.GAP, rest
        else:
            held = 0 if final else held_back(thought, END, space="\n")
            thought, self._buffer = thought[: len(thought) - held], thought[len(thought) - held :]
        if mark or final:
            thought = thought.rstrip("\n")
        if self._at_start:
            thought = thought.lstrip("\n")
            self._at_start = not thought
        return thought


def thinking_tokens(tokens: Sequence[bytes], *, begun: bool) -> int:
    """Return how many of a completion's tokens were spent on its thought, the marks among them.

    >>> thinking_tokens([b"<th", b"ink>", b"Hm.", b"</think>", b"Yes"], begun=False)
    4
    >>> thinking_tokens([b"Yes"], begun=False), thinking_tokens([b"Hm", b"."], begun=True)
    (0, 2)
    """
    opening, closing, text = START.encode(), END.encode(), b""
    for count, data in enumerate(tokens, 1):
        text += data
        if not begun:
            begun = text.lstrip().startswith(opening)
            if not begun and not opening.startswith(text.lstrip()):
                return 0
        elif closing in text[-len(closing) - len(data) :]:
            return count
    return len(tokens) if begun else 0
