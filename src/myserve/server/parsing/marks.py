"""A mark that ends a part of a text may come in pieces: what may be its beginning is held back until it is known."""

from __future__ import annotations

__all__ = ["held_back"]


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
