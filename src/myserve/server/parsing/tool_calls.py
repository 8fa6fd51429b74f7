"""Tool calls in a model's text: found as the text comes, and nothing else is ever lost.

What is not a call, though it looks like the beginning of one, is given back as the text that it was. Only white space
around calls belongs to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    text: str


ScheduledTokens = Text | CallStart | Arguments


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How a family of models writes a call: `begin`, an object with name and arguments, `end`.

    Without a `begin`, calls stand at the start of the answer and nowhere else.
    """

    name: str
    begin: str
    end: str
    between: str  # two calls
    key: str  # of the arguments

    def header(self, function: str) -> str:
        """The text of a call before its arguments, as a trained model writes it."""
        return f'{self.begin}{{"name": {json.dumps(function)}, "{self.key}": '

    @property
    def footer(self) -> str:
        """The text behind them."""
        return "}" + self.end


HERMES = ToolStyle("hermes", "<tool_call>\n", "\n</tool_call>", "\n", "arguments")
LLAMA3_JSON = ToolStyle("llama3_json", "", "", "; ", "parameters")
STYLES = {style.name: style for style in (HERMES, LLAMA3_JSON)}
TOOL_STYLES = ("auto", "none", *STYLES)

_HEADER = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_BEGINNINGS = ('{"name":', '{"type":"function","name":', '{"arguments":', '{"parameters":')


class _ReaderState(Enum):
    OUTSIDE = "outside"
    HEADER = "header"  # behind `begin`, before the arguments
    ARGUMENTS = "arguments"
    FOOTER = "footer"  # behind the arguments, before the end


class CallReader:
    """Reads one answer: `feed` its text as it comes, `end` once. `names` are the tools that there are.

    >>> reader = CallReader(HERMES, {"f"})
    >>> reader.feed('Well. <tool_call>{"name": "f", "arguments": {"a"'), reader.feed(': 1}}</tool_call>')
    ([Text(text='Well.'), CallStart(name='f'), Arguments(text='{"a"')], [Arguments(text=': 1}')])
    """

    def __init__(self, style: ToolStyle, names: Collection[str]) -> None:
        self._begin, self._end = style.begin.strip(), style.end.strip()
        self._names = names
        self._buffer = ""
        self._space = ""  # before a `begin`: the call's, if it is one
        self._state = _ReaderState.OUTSIDE
        self._may_call = True  # without a `begin`: only text of calls has come
        self._after_call = False
        self._json = _Braces()
        self._pieces: list[ScheduledTokens] = []

    def feed(self, text: str) -> list[ScheduledTokens]:
        """What is known now that this has come."""
        self._buffer += text
        return self._read(final=False)

    def end(self) -> list[ScheduledTokens]:
        """What was held back."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[ScheduledTokens]:
        steps = {
            _ReaderState.OUTSIDE: self._outside,
            _ReaderState.HEADER: self._header,
            _ReaderState.ARGUMENTS: self._arguments,
            _ReaderState.FOOTER: self._footer,
        }
        while steps[self._state](final):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    # Each returns whether another state may go on.

    def _outside(self, final: bool) -> bool:
        if not self._begin:
            return self._outside_unmarked(final)
        before, mark, rest = self._buffer.partition(self._begin)
        if mark:
            self._text(before.rstrip())
            self._space = before[len(before.rstrip()) :]
            self._buffer, self._state = rest, _ReaderState.HEADER
            return True
        held = _held(before, self._begin)
        if final:
            held = len(before) if self._after_call and not before.strip() else 0
        self._text(before[: len(before) - held])
        self._buffer = "" if final else before[len(before) - held :]
        return False

    def _outside_unmarked(self, final: bool) -> bool:
        start = self._buffer.lstrip("; \n\t\r" if self._after_call else None)
        if self._may_call and start.startswith("{"):
            self._state = _ReaderState.HEADER
            return True
        if self._may_call and not start and (not final or self._after_call):
            return False
        self._may_call = False
        self._text(self._buffer)
        self._buffer = ""
        return False

    def _header(self, final: bool) -> bool:
        skipped = "; \n\t\r" if not self._begin and self._after_call else " \n\t\r"
        body = self._buffer.lstrip(skipped)
        match = _HEADER.match(body)
        if match and json.loads(match[1], strict=False) in self._names:
            self._pieces.append(CallStart(json.loads(match[1], strict=False)))
            self._buffer, self._json, self._state = body[match.end() :], _Braces(), _ReaderState.ARGUMENTS
            return True
        before, mark, rest = self._buffer.partition(self._end) if self._end else (self._buffer, "", "")
        if mark or final or not self._may_become_call(body):
            call = self._whole_call(before.strip(skipped))
            if call is not None:
                self._pieces += call
                self._after_call = True
            elif self._begin:
                self._text(self._space + self._begin + before + mark)
            else:
                self._may_call = False
                self._text(self._buffer)
            self._buffer, self._state = rest, _ReaderState.OUTSIDE
            return True
        return False

    def _may_become_call(self, body: str) -> bool:
        if self._begin:
            return True  # its end will come, and tell
        compact = re.sub(r"\s", "", body)
        return any(b.startswith(compact) or compact.startswith(b) for b in _BEGINNINGS)

    def _whole_call(self, body: str) -> list[ScheduledTokens] | None:
        """A call whose parts stand in another order than models write them."""
        try:
            call: Any = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.get("name") not in self._names:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        return [CallStart(call["name"]), Arguments(json.dumps(arguments, ensure_ascii=False))]

    def _arguments(self, final: bool) -> bool:
        length = self._json.read(self._buffer)
        if length:
            self._pieces.append(Arguments(self._buffer[:length]))
            self._buffer = self._buffer[length:]
        if self._json.is_closed:
            self._state = _ReaderState.FOOTER
            return True
        return False

    def _footer(self, final: bool) -> bool:
        left = self._buffer
        for part in filter(None, ("}", self._end)):
            rest = left.lstrip()
            if rest.startswith(part):
                left = rest[len(part) :]
            elif part.startswith(rest) and not final:
                return False  # it may come yet
            else:
                break  # without its end the call is a call all the same
        self._buffer = left
        self._after_call, self._state = True, _ReaderState.OUTSIDE
        return True

    def _text(self, text: str) -> None:
        if text:
            self._pieces.append(Text(text))
            self._after_call = False


class _Braces:
    """Where a JSON object ends: counts braces outside of strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.is_closed = False

    def read(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for position, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_closed = True
                    return position + 1
        return len(text)


def _held(text: str, mark: str) -> int:
    """How much of the end of `text` may belong to a `mark` that is still to come, with the white space before it.

    >>> _held("a <to", "<tool_call>"), _held("a <b", "<tool_call>"), _held("a  ", "<tool_call>")
    (4, 0, 2)
    """
    length = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    before = text[: len(text) - length]
    return length + len(before) - len(before.rstrip())
