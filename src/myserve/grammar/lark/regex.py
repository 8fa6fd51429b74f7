"""Reads a regular expression: the part of the syntax that Python's `re` (Lark's own) and Rust's `regex` share.

What the two read differently, or what is no set of texts (look-around, anchors, back references, lazy repetition,
which decides where a terminal ends), is not read: `UnreadableError`.
"""

from __future__ import annotations

import re
import unicodedata

from myserve.grammar.lark.expressions import (
    ASCII,
    Characters,
    Expression,
    OneOf,
    Repeat,
    Series,
    UnreadableError,
    spelled,
)
from myserve.grammar.schemas import class_members

__all__ = ["read_regex"]

_QUANTIFIER = re.compile(r"([*+?])|\{([0-9]{1,5})(?:(,)([0-9]{1,5})?)?\}")
_CODE = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|[xu]\{([0-9A-Fa-f]{1,6})\}")
_CATEGORY = re.compile(r"([pP])(?:\{([A-Z][a-z]?)\}|([A-Z]))")
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}
# of ASCII in a class: what all dialects have, and what any has
_INSIDE = {
    "d": frozenset("0123456789"),
    "w": frozenset(c for c in ASCII if c.isalnum() or c == "_"),
    "s": frozenset("\t\n\f\r "),
}
_OUTSIDE = _INSIDE | {"s": frozenset("\t\n\v\f\r\x1c\x1d\x1e\x1f ")}
_LARGEST = 0x10FFFF
_LINE_FEED = "\n"


def read_regex(source: str, flags: str = "", *, is_whole: bool = False) -> Expression:
    r"""Return the expression of a regex. `is_whole`: it is all of the text, so that anchors around it say nothing.

    Raises UnreadableError.

    >>> read_regex("[a-c]{2,}").most is None
    True
    >>> read_regex("(?=a)")
    Traceback (most recent call last):
    ...
    myserve.grammar.lark.expressions.UnreadableError: look-around, or flags inside, in the regex '(?=a)' at character 1
    """
    if set(flags) - set("imsu"):
        raise UnreadableError(f"the flags {flags!r} of a regex")
    reader = _RegexReader(source, ignores_case="i" in flags, dot_is_all="s" in flags, is_whole=is_whole)
    found = reader.choice()
    if reader.at < len(source):
        raise UnreadableError(f"an unopened ')' in the regex {source!r:.80}")
    return found


class _RegexReader:
    def __init__(self, source: str, *, ignores_case: bool, dot_is_all: bool, is_whole: bool) -> None:
        self.source, self.at = source, 0
        self._ignores_case = ignores_case
        self._dot_is_all = dot_is_all
        self._is_whole = is_whole
        self._depth = 0

    def choice(self) -> Expression:
        options = [self._series()]
        while self._takes("|"):
            options.append(self._series())
        return options[0] if len(options) == 1 else OneOf(tuple(options))

    def _series(self) -> Expression:
        parts: list[Expression] = []
        anchored = self._is_whole and not self._depth
        if anchored:
            self._takes("^")
        while self.at < len(self.source) and self.source[self.at] not in "|)":
            if (
                anchored
                and self.source[self.at] == "$"
                and self.source[self.at + 1 : self.at + 2] in ("", "|")
            ):
                self.at += 1
            else:
                parts.append(self._repeated(self._atom()))
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def _repeated(self, part: Expression) -> Expression:
        match = _QUANTIFIER.match(self.source, self.at)
        if match is None:
            return part
        self.at = match.end()
        if self.source[self.at : self.at + 1] in ("?", "+", "*", "{"):
            raise self._unreadable("lazy, possessive or doubled repetition")
        if match[1]:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[match[1]]
            return Repeat(part, least, most)
        low = int(match[2])
        high = low if match[3] is None else None if match[4] is None else int(match[4])
        if high is not None and high < low:
            raise self._unreadable("a repetition whose bounds are the wrong way round")
        return Repeat(part, low, high)

    def _atom(self) -> Expression:
        character = self.source[self.at]
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character in "^$*+?{":
            raise self._unreadable(f"{character!r} as it stands")
        self.at += 1
        if character == ".":
            if self._dot_is_all:
                return Characters(_range("\0", chr(_LARGEST)), ASCII, goes_beyond=True)
            return Characters(f"^{spelled(_LINE_FEED)}", ASCII - {_LINE_FEED}, goes_beyond=True)
        if character != "\\":
            return Characters.of(character, ignores_case=self._ignores_case)
        return self._escape()

    def _group(self) -> Expression:
        opened = re.compile(r"\((\?:|\?P?<[A-Za-z_]\w*>|(?!\?))").match(self.source, self.at)
        if opened is None:
            raise self._unreadable("look-around, or flags inside,")
        self.at = opened.end()
        self._depth += 1
        inside = self.choice()
        self._depth -= 1
        if not self._takes(")"):
            raise self._unreadable("an open group")
        return inside

    def _escape(self) -> Expression:
        """Read what stands behind a backslash, outside of a class."""
        return self._members(is_negated=False) or Characters.of(
            self._literal(), ignores_case=self._ignores_case
        )

    def _class(self) -> Expression:
        self.at += 1
        is_negated = self._takes("^")
        pieces = [self._piece(is_negated=is_negated)]
        while not self._takes("]"):
            pieces.append(self._piece(is_negated=is_negated))
        members = "".join(f"[{p.members}]" if p.members[0] == "^" else p.members for p in pieces)
        inside = frozenset[str]().union(*(piece.ascii for piece in pieces))
        if self._ignores_case:
            inside |= {other for c in inside for other in (c.lower(), c.upper())}
        goes_beyond = any(piece.goes_beyond for piece in pieces)
        if not is_negated:
            return Characters(members, inside, goes_beyond, self._ignores_case)
        return Characters(f"^{members}", ASCII - inside, True, self._ignores_case)

    def _piece(self, *, is_negated: bool) -> Characters:
        """Read one member of a class: a character, a range, or a class behind a backslash."""
        rest = self.source[self.at :]
        if not rest or rest[0] == "[" or rest[:2] in ("&&", "--", "~~", "||"):
            raise self._unreadable("an open class, or a class in a class")
        self.at += 1
        low = rest[0]
        if low == "\\":
            if (members := self._members(is_negated=is_negated)) is not None:
                return members
            low = self._literal()
        high = self._end_of_range(low)
        inside = frozenset(character for character in ASCII if low <= character <= high)
        return Characters(_range(low, high), inside, not high.isascii())

    def _end_of_range(self, low: str) -> str:
        if self.source[self.at : self.at + 1] != "-" or self.source[self.at + 1 : self.at + 2] in ("", "]"):
            return low
        if self.source[self.at + 1] in "-[":
            raise self._unreadable("a class in a class")
        self.at += 2
        high = self.source[self.at - 1]
        if high == "\\":
            if self.source[self.at : self.at + 1] in (*"dDsSwWpP",):
                raise self._unreadable("a range that ends in a class")
            high = self._literal()
        if high < low:
            raise self._unreadable("a range whose ends are the wrong way round")
        return high

    def _members(self, *, is_negated: bool) -> Characters | None:
        """Read a class behind a backslash; None: it is another escape."""
        letter = self.source[self.at : self.at + 1]
        if letter and letter in "dDwWsS":
            self.at += 1
            members = class_members(letter, is_negated=is_negated)
            return Characters(members, _ascii_of(letter, is_negated=is_negated), letter.isupper())
        match = _CATEGORY.match(self.source, self.at)
        if match is None:
            return None
        self.at = match.end()
        category = match[2] or match[3]
        inside = frozenset(c for c in ASCII if unicodedata.category(c).startswith(category))
        members = rf"\{match[1]}{{{category}}}"
        return Characters(members, inside if match[1] == "p" else ASCII - inside, goes_beyond=True)

    def _literal(self) -> str:
        """Read an escaped character; `at` stands behind the backslash."""
        if (match := _CODE.match(self.source, self.at)) is not None:
            self.at = match.end()
            code = int(next(group for group in match.groups() if group), 16)
            if code > _LARGEST or 0xD800 <= code < 0xE000:
                raise self._unreadable("an escape of no character")
            return chr(code)
        character = self.source[self.at : self.at + 1]
        self.at += 1
        if character in _CONTROLS and character:
            return _CONTROLS[character]
        if not character or character.isalnum() or not character.isascii():
            raise self._unreadable(f"\\{character}")
        return character

    def _takes(self, character: str) -> bool:
        if self.source[self.at : self.at + 1] != character:
            return False
        self.at += 1
        return True

    def _unreadable(self, what: str) -> UnreadableError:
        return UnreadableError(f"{what} in the regex {self.source!r:.80} at character {self.at + 1}")


def _range(low: str, high: str) -> str:
    return spelled(low) if low == high else f"{spelled(low)}-{spelled(high)}"


def _ascii_of(letter: str, *, is_negated: bool) -> frozenset[str]:
    """Return the characters of ASCII in a class, as `class_members` has them."""
    is_complement = letter.isupper()
    inside = (_OUTSIDE if is_complement != is_negated else _INSIDE)[letter.lower()]
    return ASCII - inside if is_complement else inside
