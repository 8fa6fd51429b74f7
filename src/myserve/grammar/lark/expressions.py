"""Rules, terminals and regular expressions come down to these: sets of characters, series, choices, repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ASCII",
    "ESCAPED_IN_JSON",
    "NOTHING",
    "Characters",
    "Expression",
    "Name",
    "OneOf",
    "Repeat",
    "Series",
    "Token",
    "UnreadableError",
    "named_in",
    "spelled",
    "text",
]

ASCII = frozenset(map(chr, range(128)))
# What no JSON string holds as it is.
ESCAPED_IN_JSON = frozenset(map(chr, range(0x20))) | {'"', "\\"}


def spelled(character: str) -> str:
    r"""Return a character as it stands in a class of Rust's regexes, and outside of one.

    >>> print(spelled("a"), spelled("]"))
    a \x{5d}
    """
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"


class UnreadableError(ValueError):
    """A text is no grammar, or has something in it that is not known here. The words say what and where."""


@dataclass(frozen=True, slots=True)
class Characters:
    """One character of a set. `members`: the inside of a class of Rust's regexes.

    `ascii` are those of ASCII in it, `goes_beyond` says whether it has others.
    """

    members: str
    ascii: frozenset[str]
    goes_beyond: bool
    ignores_case: bool = False
    only: str | None = None  # the one character of the set, where it is one

    @staticmethod
    def of(character: str, *, ignores_case: bool = False) -> Characters:
        """Return the set of one character, and of its other case where that does not count."""
        cases = {character, character.lower(), character.upper()} if ignores_case else {character}
        return Characters(
            spelled(character),
            frozenset(cases) & ASCII,
            not character.isascii(),
            ignores_case=len(cases) > 1,
            only=character if len(cases) == 1 else None,
        )

    @property
    def escaped(self) -> frozenset[str]:
        """Return those that JSON escapes."""
        return self.ascii & ESCAPED_IN_JSON

    @property
    def has_plain(self) -> bool:
        """Return whether it has any that JSON does not escape."""
        return self.goes_beyond or bool(self.ascii - ESCAPED_IN_JSON)

    @property
    def regex(self) -> str:
        """Return the set as a regular expression."""
        return f"(?i:[{self.members}])" if self.ignores_case else f"[{self.members}]"


@dataclass(frozen=True, slots=True)
class Name:
    """A rule or terminal by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Series:
    """One part behind the other; none: the empty text."""

    parts: tuple[Expression, ...] = ()


NOTHING = Series()


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of several."""

    options: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part `least` to `most` times; `most` None: any number."""

    part: Expression
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Token:
    """A terminal in a rule: what `%ignore` names may stand behind it."""

    part: Expression


Expression = Characters | Name | Series | OneOf | Repeat | Token


def text(characters: str, *, ignores_case: bool = False) -> Expression:
    """Return the expression of a literal text."""
    return Series(tuple(Characters.of(character, ignores_case=ignores_case) for character in characters))


def named_in(expression: Expression) -> frozenset[str]:
    """Return the names in an expression.

    >>> sorted(named_in(OneOf((Name("a"), Repeat(Series((Name("b"), text("x"))), 0, None)))))
    ['a', 'b']
    """
    match expression:
        case Name(name):
            return frozenset({name})
        case Series(parts) | OneOf(parts):
            return _union(parts)
        case Repeat(part) | Token(part):
            return named_in(part)
        case _:
            return frozenset()


def _union(parts: Sequence[Expression]) -> frozenset[str]:
    return frozenset().union(*map(named_in, parts))
