"""A mark that ends a part of a text may come in pieces: what may be its beginning is held back until it is known."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["ThoughtReader", "held_back"]


class ThoughtReader(ABC):
    """Splits one completion in two, (thought, answer), as its text comes."""

    def __init__(self) -> None:
        self._buffer = ""  # what is not told yet

    def feed(self, text: str) -> tuple[str, str]:
        """Return (thought, answer), as far as they are known with this text."""
        self._buffer += text
        return self._read(final=False)

    def end(self) -> tuple[str, str]:
        """Return what was held back."""
        return self._read(final=True)

    @abstractmethod
    def _read(self, *, final: bool) -> tuple[str, str]: ...


def held_back(text: str, mark: str, space: str | None = None) -> int:
    """Return how many characters at the end of `text` may belong to a `mark` still to come.

    The white space before a mark belongs to it: any, or the characters in `space`.

    >>> held_back("a <to", "<tool_call>"), held_back("a <b", "<tool_call>"), held_back("a  ", "<tool_call>")
    (4, 0, 2)
    >>> held_back("Hm. \\n</th", "</think>", space="\\n")
    5
    """
    length = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    before = text[: len(text) - length]
    return length + len(before) - len(before.rstrip(space))
