"""Reads a grammar in Lark's notation: rules, terminals, `%import common`, `%ignore`.

What is ignored may stand before each terminal and behind the last. Templates, priorities between terminals, set
operations, attributes, and what llguidance adds (`%json`, `%regex`, special tokens) are not read: `UnreadableError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from myserve.grammar.lark.common import COMMON
from myserve.grammar.lark.expressions import (
    ASCII,
    NOTHING,
    Characters,
    Expression,
    Name,
    OneOf,
    Repeat,
    Series,
    Token,
    UnreadableError,
    named_in,
    spelled,
    text,
)
from myserve.grammar.lark.regex import read_regex

__all__ = ["START", "LarkGrammar", "read_lark", "read_pattern"]

START = "start"

_LEXEME = re.compile(
    r"""(?P<skip>[ \t\f]+|//[^\n]*|\#[^\n]*)
    |(?P<line>\r?\n)
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?![/*])(?:\\.|[^/\\\n])+/[a-z]*)
    |(?P<name>[?!]{0,2}[A-Za-z_][A-Za-z0-9_]*)
    |(?P<number>[0-9]{1,5})
    |(?P<mark>\.\.|->|%[a-z]+|[:|()\[\]{},~.*+?])""",
    re.VERBOSE,
)
_STRING_ESCAPES = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "f": "\f",
    "v": "\v",
    "b": "\b",
    '"': '"',
    "\\": "\\",
    "/": "/",
}
_STRING_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|(.))", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class LarkGrammar:
    """Rules and terminals by their names, those alone that `start` needs, and what may stand around each `Token`."""

    rules: dict[str, Expression]
    ignored: Expression = NOTHING

    @property
    def terminals(self) -> dict[str, Expression]:
        """Return those that have no tokens in them, but are ones."""
        return {name: rule for name, rule in self.rules.items() if _is_terminal(name)}

    @property
    def recurs(self) -> bool:
        """Return whether a rule stands in what it is made of: then no regular expression is the same."""
        return _recurs(self.rules)


@lru_cache(maxsize=256)
def read_lark(source: str) -> LarkGrammar:
    """Return a grammar's rules. Raises UnreadableError with what is not known, or is no Lark.

    >>> sorted(read_lark('start: "a" b?\\nb: /[0-9]/ | WS\\n%import common.WS').rules)
    ['WS', 'b', 'start']
    """
    try:
        return _RuleReader(source).grammar()
    except RecursionError:
        raise UnreadableError("parentheses in a great many others") from None


@lru_cache(maxsize=256)
def read_pattern(source: str) -> LarkGrammar:
    """Return the grammar of the texts that match a regular expression as a whole. Raises UnreadableError."""
    try:
        return LarkGrammar({START: read_regex(source, is_whole=True)})
    except RecursionError:
        raise UnreadableError("parentheses in a great many others") from None


@dataclass(frozen=True, slots=True)
class _Lexeme:
    kind: str
    text: str
    line: int


class _RuleReader:
    def __init__(self, source: str) -> None:
        self._lexemes = _lexemes(source)
        self._at = 0
        self._rules: dict[str, Expression] = {}
        self._ignored: list[Expression] = []
        self._in_rule = False

    def grammar(self) -> LarkGrammar:
        while self._peek().kind != "end":
            if self._peek().kind == "line":
                self._at += 1
            else:
                self._statement()
                if self._peek().kind not in ("line", "end"):
                    raise self._unreadable("the end of a rule")
        self._check_names()
        ignored = Repeat(OneOf(tuple(self._ignored)), 0, None) if self._ignored else NOTHING
        terminals = {name: rule for name, rule in self._rules.items() if _is_terminal(name)}
        if _recurs(terminals):
            raise UnreadableError("a terminal that stands in itself")
        needed = _needed(self._rules, named_in(ignored))
        return LarkGrammar({name: rule for name, rule in self._rules.items() if name in needed}, ignored)

    def _statement(self) -> None:
        if self._takes("%import"):
            self._import()
        elif self._takes("%ignore"):
            self._in_rule = False
            self._ignored.append(self._choice())
        elif self._peek().kind == "name":
            self._definition()
        else:
            raise self._unreadable("a rule, %import or %ignore")

    def _definition(self) -> None:
        name = self._name().lstrip("?!")
        if self._takes("."):
            self._number()
            if _is_terminal(name):
                raise UnreadableError(f"the priority of the terminal {name}")
        self._wants(":")
        if name in self._rules:
            raise UnreadableError(f"two definitions of {name}")
        self._in_rule = not _is_terminal(name)
        self._rules[name] = self._choice()

    def _import(self) -> None:
        library = self._name()
        if library != "common" or not (self._takes(".") or self._peek().text == "("):
            raise UnreadableError(f"%import {library}: of libraries there is common alone")
        if self._takes("("):
            names = [self._name()]
            while self._takes(","):
                names.append(self._name())
            self._wants(")")
            aliases = names
        else:
            names = [self._name()]
            aliases = [self._name()] if self._takes("->") else names
        for name, alias in zip(names, aliases, strict=True):
            if name not in COMMON:
                raise UnreadableError(f"%import common.{name}, which is not known")
            if alias in self._rules:
                raise UnreadableError(f"two definitions of {alias}")
            self._rules[alias] = read_regex(COMMON[name])

    def _choice(self) -> Expression:
        options = [self._series()]
        while self._takes_bar():
            options.append(self._series())
        return options[0] if len(options) == 1 else OneOf(tuple(options))

    def _series(self) -> Expression:
        parts: list[Expression] = []
        while self._peek().kind in ("string", "regex", "name") or self._peek().text in ("(", "["):
            parts.append(self._repeated(self._atom()))
        if self._takes("->"):  # the name of a branch of the parse tree
            self._name()
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def _atom(self) -> Expression:
        lexeme = self._next()
        if lexeme.text in ("(", "["):
            inside = self._choice()
            self._wants(")" if lexeme.text == "(" else "]")
            return inside if lexeme.text == "(" else Repeat(inside, 0, 1)
        if lexeme.kind == "name":
            name = Name(lexeme.text)
            return Token(name) if self._in_rule and _is_terminal(lexeme.text) else name
        found = self._regex(lexeme) if lexeme.kind == "regex" else self._string(lexeme)
        return Token(found) if self._in_rule else found

    def _regex(self, lexeme: _Lexeme) -> Expression:
        source, _, flags = lexeme.text[1:].rpartition("/")
        return read_regex(source.replace("\\/", "/"), flags)

    def _string(self, lexeme: _Lexeme) -> Expression:
        ignores_case = lexeme.text.endswith("i")
        literal = _unquoted(lexeme)
        if not self._takes(".."):
            return text(literal, ignores_case=ignores_case)
        last = _unquoted(self._next())
        if ignores_case or len(literal) != 1 or len(last) != 1 or last < literal:
            raise self._unreadable("a range of two characters")
        inside = frozenset(character for character in ASCII if literal <= character <= last)
        return Characters(f"{spelled(literal)}-{spelled(last)}", inside, not last.isascii())

    def _repeated(self, part: Expression) -> Expression:
        for mark, (least, most) in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self._takes(mark):
                return Repeat(part, least, most)
        if self._takes("~"):
            low = self._number()
            return self._bounded(part, low, self._number() if self._takes("..") else low)
        if self._takes("{"):
            low = self._number()
            high: int | None = low
            if self._takes(","):
                high = self._number() if self._peek().kind == "number" else None
            self._wants("}")
            return self._bounded(part, low, high)
        return part

    def _bounded(self, part: Expression, low: int, high: int | None) -> Expression:
        if high is not None and high < low:
            raise self._unreadable("bounds the right way round")
        return Repeat(part, low, high)

    def _check_names(self) -> None:
        if START not in self._rules:
            raise UnreadableError("no rule with the name 'start'")
        for rule in [*self._rules.values(), *self._ignored]:
            if unknown := sorted(named_in(rule) - self._rules.keys()):
                raise UnreadableError(f"{unknown[0]!r:.80}, which is not defined")
        for name, rule in self._rules.items():
            if _is_terminal(name) and any(not _is_terminal(other) for other in named_in(rule)):
                raise UnreadableError(f"a rule in the terminal {name}")

    def _peek(self) -> _Lexeme:
        return self._lexemes[self._at]

    def _next(self) -> _Lexeme:
        self._at += 1
        return self._lexemes[self._at - 1]

    def _takes(self, mark: str) -> bool:
        if self._peek().kind != "mark" or self._peek().text != mark:
            return False
        self._at += 1
        return True

    def _takes_bar(self) -> bool:
        """A line that begins with a bar goes on with the rule before it."""
        began = self._at
        while self._peek().kind == "line":
            self._at += 1
        if self._takes("|"):
            return True
        self._at = began
        return False

    def _wants(self, mark: str) -> None:
        if not self._takes(mark):
            raise self._unreadable(repr(mark))

    def _name(self) -> str:
        if self._peek().kind != "name":
            raise self._unreadable("a name")
        return self._next().text

    def _number(self) -> int:
        if self._peek().kind != "number":
            raise self._unreadable("a number")
        return int(self._next().text)

    def _unreadable(self, wanted: str) -> UnreadableError:
        found = self._peek()
        return UnreadableError(f"line {found.line}: {wanted} is wanted where {found.text!r:.40} is")


def _lexemes(source: str) -> list[_Lexeme]:
    found, at, line = [], 0, 1
    while at < len(source):
        match = _LEXEME.match(source, at)
        if match is None:
            raise UnreadableError(f"line {line}: {source[at : at + 20]!r}")
        kind = match.lastgroup or ""
        if kind != "skip":
            found.append(_Lexeme(kind, match[0], line))
        line += match[0].count("\n")
        at = match.end()
    return [*found, _Lexeme("end", "", line)]


def _unquoted(lexeme: _Lexeme) -> str:
    if lexeme.kind != "string":
        raise UnreadableError(f"line {lexeme.line}: a string is wanted where {lexeme.text!r:.40} is")

    def character(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code is None and match[3] not in _STRING_ESCAPES:
            raise UnreadableError(f"line {lexeme.line}: {match[0]} in a string")
        found = _STRING_ESCAPES[match[3]] if code is None else chr(int(code, 16))
        if 0xD800 <= ord(found) < 0xE000:
            raise UnreadableError(f"line {lexeme.line}: half of a character in a string")
        return found

    return _STRING_ESCAPE.sub(character, lexeme.text.removesuffix("i")[1:-1])


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _needed(rules: dict[str, Expression], ignored: frozenset[str]) -> set[str]:
    found, waiting = {START, *ignored}, [START, *ignored]
    while waiting:
        new = named_in(rules[waiting.pop()]) - found
        found |= new
        waiting += new
    return found


def _recurs(rules: dict[str, Expression]) -> bool:
    """Take out what is made of nothing that is left, again and again: what stays is in a circle, or needs one."""
    left = {name: set(named_in(rule)) & rules.keys() for name, rule in rules.items()}
    while done := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in done:
            del left[name]
    return bool(left)
