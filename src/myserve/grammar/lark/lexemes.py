r"""A terminal that is a lexeme in a JSON string: it must end where a lexer knows it, before a backslash or behind one.

A lexer takes the longest lexeme and never goes back. Of `/[a-z"]*/` and a line break behind it, it would have to choose
at the backslash of `\n`, before the character that tells it from `\"`. So such a terminal is cut before each escape:
what is a loop over one set of characters becomes lexemes of which none goes on with an escape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
)
from myserve.grammar.lark.json_escapes import plain_of

__all__ = ["check_ends", "cut_before_escapes", "escapes_that_go_on"]

MOST_POSITIONS = 5000  # of characters in terminals, repetitions counted out
MOST_STATES = 3000


def cut_before_escapes(
    terminal: Expression, ignored: Expression, terminals: Mapping[str, Expression]
) -> Expression:
    """Return a terminal, behind what is ignored, as an expression whose `Token`s are lexemes.

    Raises UnreadableError for a terminal that cannot be cut so.
    """
    whole = _resolved(terminal, terminals)
    before = _resolved(ignored, terminals)
    if not _flat(whole):
        return NOTHING
    if not escapes_that_go_on(Series((before, whole))):
        return Token(Series((before, whole)))
    *first, last = _flat(whole) or [NOTHING]
    if not (
        isinstance(last, Repeat)
        and isinstance(last.part, Characters)
        and last.most is None
        and last.least < 2
    ):
        raise UnreadableError(
            "where rules recur, a terminal that may end before a quote, a backslash or a line break, and is no loop"
        )
    return _cut(Series((before, *first)), last.part, least=last.least, has_first=bool(first))


def check_ends(lexemes: tuple[Expression, ...]) -> None:
    """Raise UnreadableError where one lexeme may end and the same one, or another, go on with an escape from there."""
    if escapes_that_go_on(OneOf(lexemes)):
        raise UnreadableError(
            "where rules recur, a terminal that ends where one goes on with a quote, a backslash or a line break"
        )


def _cut(first: Expression, looped: Characters, *, least: int, has_first: bool) -> Expression:
    """Return `first looped*`, cut before each escape in the loop."""
    escape = Characters(looped.members, looped.escaped, goes_beyond=False)
    plain = plain_of(looped)
    run = Repeat(plain, 0, None) if looped.has_plain else NOTHING
    runs = Repeat(Token(Series((escape, run))), 0, None)
    if has_first and not least:
        return Series((Token(Series((first, run))), runs))
    options: list[Expression] = []
    if looped.has_plain:
        options.append(Token(Series((first, Repeat(plain, 1, None)))))
    if has_first:
        options.append(Series((Token(first), Token(Series((escape, run))))))
    else:
        options.append(Token(Series((first, escape, run))))
    return Repeat(Series((OneOf(tuple(options)), runs)), least, 1)


def _flat(expression: Expression) -> list[Expression]:
    if isinstance(expression, Series):
        return [flat for part in expression.parts for flat in _flat(part)]
    return [expression]


def _resolved(expression: Expression, terminals: Mapping[str, Expression]) -> Expression:
    match expression:
        case Name(name):
            return _resolved(terminals[name], terminals)
        case Series(parts):
            return Series(tuple(_resolved(part, terminals) for part in parts))
        case OneOf(options):
            return OneOf(tuple(_resolved(option, terminals) for option in options))
        case Repeat(part, least, most):
            return Repeat(_resolved(part, terminals), least, most)
        case _:
            return expression


# ---- which escapes a whole text of a lexeme may go on with


@dataclass(slots=True)
class _Span:
    """A part of a lexeme by its positions, those of characters in it: which are first, which last; may it be empty."""

    is_nullable: bool
    first: frozenset[int]
    last: frozenset[int]


class _Positions:
    """Glushkov's automaton: a state is a position, and `follow` says which may come next."""

    def __init__(self) -> None:
        self.characters: list[Characters] = []
        self.follow: list[set[int]] = []

    def of(self, expression: Expression) -> _Span:
        match expression:
            case Characters():
                if len(self.characters) >= MOST_POSITIONS:
                    raise UnreadableError("where rules recur, terminals with a great many characters")
                self.characters.append(expression)
                self.follow.append(set())
                own = frozenset({len(self.characters) - 1})
                return _Span(False, own, own)
            case OneOf(options):
                parts = [self.of(option) for option in options]
                first = frozenset[int]().union(*(part.first for part in parts))
                last = frozenset[int]().union(*(part.last for part in parts))
                return _Span(any(part.is_nullable for part in parts), first, last)
            case Series(parts):
                found = _Span(True, frozenset(), frozenset())
                for part in parts:
                    found = self._behind(found, self.of(part))
                return found
            case Repeat(part, least, most):
                return self._repeated(part, least, most)
        raise TypeError(expression)

    def _behind(self, one: _Span, two: _Span) -> _Span:
        self._join(one.last, two.first)
        return _Span(
            one.is_nullable and two.is_nullable,
            one.first | two.first if one.is_nullable else one.first,
            one.last | two.last if two.is_nullable else two.last,
        )

    def _repeated(self, part: Expression, least: int, most: int | None) -> _Span:
        found = _Span(True, frozenset(), frozenset())
        for _ in range(least):
            found = self._behind(found, self.of(part))
        if most is None:
            loop = self.of(part)
            self._join(loop.last, loop.first)
            return self._behind(found, _Span(True, loop.first, loop.last))
        for _ in range(most - least):
            more = self.of(part)
            found = self._behind(found, _Span(True, more.first, more.last))
        return found

    def alphabet(self) -> set[frozenset[int]]:
        """Return the positions that a character may have, for all characters."""
        beyond = frozenset(at for at, one in enumerate(self.characters) if one.goes_beyond)
        of_ascii = (
            frozenset(at for at, one in enumerate(self.characters) if character in one.ascii)
            for character in ASCII
        )
        return {beyond, *of_ascii}

    def _join(self, ends: frozenset[int], begins: frozenset[int]) -> None:
        for end in ends:
            self.follow[end] |= begins


def escapes_that_go_on(expression: Expression) -> frozenset[str]:
    r"""Return the characters that JSON escapes with which a whole text of an expression may go on.

    All characters beyond ASCII are taken for one, so that too many may be returned and never too few.

    >>> from myserve.grammar.lark.regex import read_regex
    >>> sorted(escapes_that_go_on(read_regex('[a-z"\n]+'))), sorted(escapes_that_go_on(read_regex('"[^"]*"')))
    (['\n', '"'], [])
    """
    positions = _Positions()
    whole = positions.of(expression)
    letters = positions.alphabet()
    begin = (whole.first, whole.is_nullable)
    states, waiting = {begin}, [begin]
    found: frozenset[str] = frozenset()
    while waiting:
        comes, is_whole = waiting.pop()
        if is_whole:
            found |= {c for at in comes for c in positions.characters[at].escaped}
        for letter in letters:
            taken = comes & letter
            after = frozenset(following for at in taken for following in positions.follow[at])
            state = (after, bool(whole.last & taken))
            if taken and state not in states:
                if len(states) > MOST_STATES:
                    raise UnreadableError("where rules recur, terminals with a great many states")
                states.add(state)
                waiting.append(state)
    return found
