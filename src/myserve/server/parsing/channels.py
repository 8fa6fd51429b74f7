"""gpt-oss writes messages, and a header names the channel of each: thoughts, answers and calls are told apart by it."""

from __future__ import annotations

import re

from myserve.server.parsing.marks import ThoughtReader, held_back

__all__ = ["CHANNEL_MARKS", "CHANNEL_TOKENS", "ChannelReader"]

# of a thought, as `Reasoning` has them
CHANNEL_MARKS = ("<|channel|>analysis<|message|>", "<|end|>")
# all that a text must show for its messages to be told apart
CHANNEL_TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>")

_START, _MESSAGE, _END = "<|start|>", "<|message|>", "<|end|>"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")
_BEGINNINGS = (_START, "<|channel|>", " to=")  # of a header; the first has `<|start|>assistant` in the prompt


class ChannelReader(ThoughtReader):
    """Splits one completion as its text comes: analysis is thought, the other channels are the answer.

    A call of a tool is part of the answer, with its header in one form, whichever of its forms it had.

    >>> reader = ChannelReader()
    >>> reader.feed("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|mess")
    ('Hm.', '')
    >>> reader.feed("age|>Yes"), reader.end()
    (('', 'Yes'), ('', ''))
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_header, self._is_thought = True, False

    def _read(self, *, final: bool) -> tuple[str, str]:
        parts = {True: "", False: ""}  # thought and answer
        while self._buffer:
            if self._in_header:
                if (header := self._header(final)) is None:
                    break
                parts[False] += header
                continue
            ends = [at for mark in (_END, _START) if (at := self._buffer.find(mark)) >= 0]
            if ends:
                at = min(ends)
                parts[self._is_thought] += self._buffer[:at]
                self._buffer = self._buffer[at:].removeprefix(_END)
                self._in_header = True
                continue
            held = 0 if final else max(held_back(self._buffer, mark, space="") for mark in (_END, _START))
            known = len(self._buffer) - held
            parts[self._is_thought] += self._buffer[:known]
            self._buffer = self._buffer[known:]
            break
        return parts[True], parts[False]

    def _header(self, final: bool) -> str | None:
        """Go behind a header; return what of it belongs to the answer. None: it has not come whole."""
        header, mark, rest = self._buffer.partition(_MESSAGE)
        begins = any(self._buffer.startswith(b) or b.startswith(self._buffer) for b in _BEGINNINGS)
        if not begins or (final and not mark):
            # no header: a text without channels
            self._in_header = self._is_thought = False
            return ""
        if not mark:
            return None
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._buffer, self._in_header = rest, False
        self._is_thought = recipient is None and channel is not None and channel[1] == "analysis"
        return "" if recipient is None else f"<|channel|>commentary to=functions.{recipient[1]}{_MESSAGE}"
