"""Tool calls in a model's text: found as the text comes, and nothing else is ever lost.

What is not a call, though it looks like the beginning of one, is given back as the text that it was. Only white space
and marks around calls belong to them. Arguments that are JSON come as they are written; those in another form come with
their call's end, for until then it may be no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from myserve.server.parsing.arguments import DECODER, Unread, read_calls
from myserve.server.parsing.marks import held_back
from myserve.server.parsing.tool_styles import ToolStyle

__all__ = ["Arguments", "CallPiece", "CallReader", "CallStart", "Text"]


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer's own text. `start` is where it stands in all that was fed, in characters."""

    text: str
    start: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class CallStart:
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    text: str


CallPiece = Text | CallStart | Arguments

_HEADER = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
# Mistral's calls have an id behind their arguments
_ID = re.compile(r'\s*,\s*"id"\s*:\s*"[^"\\]*"')
_MAY_BE_ID = re.compile(r'\s*(?:,\s*(?:"(?:i(?:d(?:"\s*(?::\s*(?:"[^"\\]*"?)?)?)?)?)?)?)?')
_BEGINNINGS = ('{"name":', '{"type":"function","name":', '{"arguments":', '{"parameters":')
_SPACE = " \n\t\r"
_TWO_WORDS = re.compile(r"[^\s\[<`]+\s+[^\s\[<`]")  # a sentence, and no name
_LONGEST_HEAD = 256  # characters; behind so many without arguments there is no call


class _ReaderState(Enum):
    OUTSIDE = "outside"
    SECTION = "section"  # behind `opening`, between calls
    HEADER = "header"  # behind `begin`, before the arguments
    ARGUMENTS = "arguments"
    FOOTER = "footer"  # behind the arguments, before the end


class CallReader:
    """Reads one answer: `feed` its text as it comes, `end` once. `tools` are the names of the tools that there are.

    With their parameters, where they are a mapping: in some forms a value does not say of which type it is.

    >>> from myserve.server.parsing.tool_styles import HERMES
    >>> reader = CallReader(HERMES, {"f"})
    >>> reader.feed('Well. <tool_call>{"name": "f", "arguments": {"a"'), reader.feed(': 1}}</tool_call>')
    ([Text(text='Well.'), CallStart(name='f'), Arguments(text='{"a"')], [Arguments(text=': 1}')])
    """

    def __init__(self, style: ToolStyle, tools: Collection[str] | Mapping[str, Any]) -> None:
        self._style = style
        self._begin, self._end = style.begin.strip(), style.end.strip()
        self._opening, self._closing = style.opening.strip(), style.closing.strip()
        self._bracket = style.bracket
        self._separators = _SPACE + style.between.strip()
        self._tools = tools if isinstance(tools, Mapping) else dict.fromkeys(tools)
        self._buffer = ""
        self._fed = 0  # characters
        self._marks = (
            ""  # before the buffer: marks, and white space around them, that are a call's if there is one
        )
        self._looked = 0  # characters of the buffer in which there is no end of this call
        self._state = _ReaderState.OUTSIDE
        self._may_call = True  # without a `begin`: only text of calls has come
        self._after_call = False
        self._json = _Braces()
        self._pieces: list[CallPiece] = []

    def feed(self, text: str) -> list[CallPiece]:
        """Return the pieces that are known with this text."""
        self._buffer += text
        self._fed += len(text)
        return self._read(final=False)

    def end(self) -> list[CallPiece]:
        """Return what was held back."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[CallPiece]:
        steps = {
            _ReaderState.OUTSIDE: self._outside,
            _ReaderState.SECTION: self._section,
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
        entry = self._opening or self._begin
        if not entry:
            return self._outside_unmarked(final)
        before, mark, rest = self._buffer.partition(entry)
        if mark:
            said = before.rstrip()
            self._text(said)
            self._marks, self._buffer = before[len(said) :] + mark, rest
            self._state = _ReaderState.SECTION if self._opening else _ReaderState.HEADER
            return True
        held = held_back(before, entry)
        if final:
            held = len(before) if self._after_call and not before.strip() else 0
        self._text(before[: len(before) - held])
        self._buffer = "" if final else before[len(before) - held :]
        return False

    def _outside_unmarked(self, final: bool) -> bool:
        start = self._buffer.lstrip(self._separators if self._after_call else None)
        if self._may_call and start.startswith("{"):
            self._state = _ReaderState.HEADER
            return True
        if self._may_call and not start and (not final or self._after_call):
            return False
        self._may_call = False
        self._text(self._buffer)
        self._buffer = ""
        return False

    def _section(self, final: bool) -> bool:
        body = self._buffer.lstrip(self._separators if self._after_call else _SPACE)
        if not self._after_call and self._bracket and not self._marks.rstrip().endswith(self._bracket):
            return self._open_bracket(body, final)
        begin = self._begin or "{"
        if body.startswith(begin):
            taken = self._buffer[: len(self._buffer) - len(body)] + self._begin
            self._marks, self._buffer = self._marks + taken, body[len(self._begin) :]
            self._state = _ReaderState.HEADER
            return True
        if self._after_call and body.startswith(self._closing):
            self._buffer, self._state = body[len(self._closing) :], _ReaderState.OUTSIDE
            return True
        closes = self._after_call and self._closing.startswith(body)
        if not final and (begin.startswith(body) or closes):
            return False
        self._give_back("", "" if final and closes else self._buffer)
        return True

    def _open_bracket(self, body: str, final: bool) -> bool:
        if body.startswith(self._bracket):
            taken = len(self._buffer) - len(body) + len(self._bracket)
            self._marks, self._buffer = self._marks + self._buffer[:taken], self._buffer[taken:]
        elif body or final:
            self._give_back("", self._buffer)
        else:
            return False
        return True

    def _header(self, final: bool) -> bool:
        if self._style.arguments is not None:
            return self._whole_header(final)
        skipped = self._separators if not self._begin and self._after_call else _SPACE
        body = self._buffer.lstrip(skipped)
        pattern = self._style.read_head or _HEADER
        match = pattern.match(body)
        if match:
            name = json.loads(match[1], strict=False) if self._style.is_object else match["name"]
            if name in self._tools:
                self._start(name)
                self._buffer, self._json, self._state = body[match.end() :], _Braces(), _ReaderState.ARGUMENTS
                return True
        return (
            self._object_header(body, skipped, final)
            if self._style.is_object
            else self._named_header(body, final)
        )

    def _named_header(self, body: str, final: bool) -> bool:
        """Give back what is no head: another tool's name, or no arguments behind it."""
        may_come = "{" not in body and len(body) < _LONGEST_HEAD and not _TWO_WORDS.match(body)
        if not final and may_come and (not self._end or self._end not in body):
            return False
        self._give_back("", self._buffer)
        return True

    def _object_header(self, body: str, skipped: str, final: bool) -> bool:
        before, mark, rest = self._buffer.partition(self._end) if self._end else (self._buffer, "", "")
        if not mark and not final and self._may_become_call(body):
            return False
        call = self._whole_call(before.strip(skipped))
        if call is not None:
            self._pieces += call
            self._marks, self._after_call, self._buffer, self._state = "", True, rest, _ReaderState.OUTSIDE
        elif self._begin or self._opening:
            self._give_back(before + mark, rest)
        else:
            self._may_call = False
            self._give_back(self._buffer, rest)
        return True

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
        if not isinstance(name, str) or name not in self._tools:
            return None
        return [CallStart(name), Arguments(arguments)]

    def _whole_header(self, final: bool) -> bool:
        """Read a call when its end is there; the text of an end inside an argument is the argument's."""
        while (at := self._buffer.find(self._end, self._looked)) >= 0:
            calls = read_calls(self._buffer[:at], self._style, self._tools)
            behind = at + len(self._end)
            if isinstance(calls, list):
                for name, arguments in calls:
                    self._start(name)
                    self._pieces.append(Arguments(arguments))
                self._buffer, self._looked = self._buffer[behind:], 0
                self._state = self._behind_call
                return True
            if calls is Unread.OTHER:
                self._give_back(self._buffer[:behind], self._buffer[behind:])
                return True
            self._looked = behind
        if not final:
            self._looked = max(self._looked, len(self._buffer) - len(self._end) + 1)
            return False
        self._give_back("", self._buffer)
        return True

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
        if self._style.is_object and (told := _ID.match(left)) is not None:
            left = left[told.end() :]
        elif self._style.is_object and not final and _MAY_BE_ID.fullmatch(left):
            return False
        for part in filter(None, (self._style.tail.strip(), self._end)):
            rest = left.lstrip()
            if rest.startswith(part):
                left = rest[len(part) :]
            elif part.startswith(rest) and not final:
                return False  # it may come yet
            else:
                break  # without its end the call is a call all the same
        self._buffer = left
        self._after_call, self._state = True, self._behind_call
        return True

    @property
    def _behind_call(self) -> _ReaderState:
        return _ReaderState.SECTION if self._opening else _ReaderState.OUTSIDE

    def _start(self, name: str) -> None:
        self._pieces.append(CallStart(name))
        self._marks, self._after_call = "", True

    def _give_back(self, text: str, rest: str) -> None:
        """Return marks that were no call's, and `text`, as text; `rest` is read anew."""
        self._text(self._marks + text, behind=len(self._marks))
        self._marks, self._buffer, self._looked, self._state = "", rest, 0, _ReaderState.OUTSIDE

    def _text(self, text: str, *, behind: int = 0) -> None:
        """Add text that begins with the buffer, or `behind` characters before it."""
        if text:
            self._pieces.append(Text(text, self._fed - len(self._buffer) - behind))
            self._after_call = False


def _raw_parts(text: str) -> dict[str, str]:
    """Return the fields of an object with each value's own text: a number written anew may be another number.

    >>> _raw_parts(' {"a": 1E5, "b": {"c": [1e400]}}')
    {'a': '1E5', 'b': '{"c": [1e400]}'}
    """
    if not isinstance(DECODER.decode(text), dict):
        raise ValueError("a call is an object")
    parts: dict[str, str] = {}
    at = text.index("{") + 1
    while text[at := _behind_space(text, at)] != "}":
        key, at = DECODER.raw_decode(text, at)
        start = _behind_space(text, text.index(":", at) + 1)
        _, at = DECODER.raw_decode(text, start)
        parts[key] = text[start:at]
        at = _behind_space(text, at)
        at += text[at] == ","
    return parts


def _raw_object(text: str) -> str:
    """Return the text of an object, or of one that stands in a string; null is an empty one. Raises ValueError."""
    value = DECODER.decode(text)
    if isinstance(value, str):
        text, value = value, DECODER.decode(value)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise ValueError("the arguments of a call are an object")
    return text


def _behind_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


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
