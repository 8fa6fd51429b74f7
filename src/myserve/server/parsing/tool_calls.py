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

from myserve.server.parsing.marks import held_back

__all__ = [
    "HERMES",
    "LLAMA3_JSON",
    "STYLES",
    "TOOL_STYLES",
    "Arguments",
    "CallPiece",
    "CallReader",
    "CallStart",
    "Text",
    "ToolStyle",
]


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    text: str


CallPiece = Text | CallStart | Arguments


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """The form in which a family of models writes a call: `begin`, an object with name and arguments, `end`.

    Without a `begin`, calls stand at the start of the answer and nowhere else.
    """

    name: str
    begin: str
    end: str
    between: str  # two calls
    key: str  # of the arguments

    def header(self, function: str) -> str:
        """Return the text of a call before its arguments, as a trained model writes it."""
        return f'{self.begin}{{"name": {json.dumps(function)}, "{self.key}": '

    @property
    def footer(self) -> str:
        """Return the text behind the arguments."""
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
        self._pieces: list[CallPiece] = []

    def feed(self, text: str) -> list[CallPiece]:
        """Return the pieces that are known with this text."""
        self._buffer += text
        return self._read(final=False)

    def end(self) -> list[CallPiece]:
        """Return what was held back."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[CallPiece]:
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
        held = held_back(before, self._begin)
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
            return True  # its end decides
        compact = re.sub(r"\s", "", body)
        return any(b.startswith(compact) or compact.startswith(b) for b in _BEGINNINGS)

    def _whole_call(self, body: str) -> list[CallPiece] | None:
        """Return a call whose parts stand in another order than models write them; its arguments as they stand."""
        try:
            parts = _raw_parts(body)
            name = json.loads(parts.get("name", "null"))
            arguments = _raw_object(parts.get("arguments", parts.get("parameters", "{}")))
        except (ValueError, RecursionError):
            return None
        if not isinstance(name, str) or name not in self._names:
            return None
        return [CallStart(name), Arguments(arguments)]

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


def _raw_parts(text: str) -> dict[str, str]:
    """Return the fields of an object with each value's own text: a number written anew may be another number.

    >>> _raw_parts(' {"a": 1E5, "b": {"c": [1e400]}}')
    {'a': '1E5', 'b': '{"c": [1e400]}'}
    """
    if not isinstance(_DECODER.decode(text), dict):
        raise ValueError("a call is an object")
    parts: dict[str, str] = {}
    at = text.index("{") + 1
    while text[at := _behind_space(text, at)] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = _behind_space(text, text.index(":", at) + 1)
        _, at = _DECODER.raw_decode(text, start)
        parts[key] = text[start:at]
        at = _behind_space(text, at)
        at += text[at] == ","
    return parts


def _raw_object(text: str) -> str:
    """Return the text of an object, or of one that stands in a string; null is an empty one. Raises ValueError."""
    value = _DECODER.decode(text)
    if isinstance(value, str):
        text, value = value, _DECODER.decode(value)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise ValueError("the arguments of a call are an object")
    return text


def _behind_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


class _Braces:
    """Find where a JSON object ends, by counting braces outside of strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.is_closed = False

    def read(self, text: str) -> int:
        """Return how many characters of `text` belong to the object."""
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
