r"""Writes a grammar again, under names of its own, for a text that stands in a JSON string or between two marks.

Where no rule recurs, all of it is one lexeme, whose automaton knows where it ends: its texts are those that the rules
derive. Else each terminal is a lexeme, which takes the longest match, as the compiler's own terminals do.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from myserve.grammar.lark.expressions import (
    NOTHING,
    Characters,
    Expression,
    Name,
    OneOf,
    Repeat,
    Series,
    Token,
    UnreadableError,
    spelled,
)
from myserve.grammar.lark.json_escapes import canonical, escaped_regex
from myserve.grammar.lark.lexemes import check_ends, cut_before_escapes
from myserve.grammar.lark.reader import START, LarkGrammar

__all__ = ["AS_IS", "IN_JSON", "Spelling", "written_in_json", "written_up_to"]


@dataclass(frozen=True, slots=True)
class Spelling:
    """Spells characters: a set as a regular expression, a literal text as another text."""

    of_set: Callable[[Characters], str]
    of_text: Callable[[str], str]
    has_escapes: bool  # which begin alike


IN_JSON = Spelling(escaped_regex, canonical, has_escapes=True)
AS_IS = Spelling(lambda characters: characters.regex, str, has_escapes=False)


def written_in_json(grammar: LarkGrammar, name: str, *, spelling: Spelling = IN_JSON) -> list[str]:
    r"""Return Lark's rules of a grammar's texts as the inside of a JSON string; `name` is the first and their prefix.

    Raises UnreadableError for rules that recur around a terminal that does not show where it ends.

    >>> from myserve.grammar.lark.reader import read_lark
    >>> print(*written_in_json(read_lark('start: "\\"" [a] "\\n"\na: /b+/'), "said"), sep="\n")
    said: SAID_0
    SAID_0: "\\\"" (SAID_1)? "\\n"
    SAID_1: ("b")+
    """
    first, lines = _written(grammar, name, spelling)
    return [f"{name}: {first}", *lines]


def written_up_to(grammar: LarkGrammar, name: str, mark: str, close: Sequence[str]) -> list[str]:
    """Return Lark's rules of a grammar's texts as they are, and of the `close` behind them.

    `close` is a series of Lark's strings and special tokens (`<[7]>`), and `mark` what of it ends the text for a
    reader. No text holds it: a special token none can hold. Raises UnreadableError where that cannot be kept to, with
    rules that recur and a close that begins with plain characters.
    """
    first, rules = _written(grammar, f"{name}_said", AS_IS)
    place = next((i for i, piece in enumerate(close) if piece.startswith("<[")), None)
    if grammar.recurs:
        if place != 0:
            raise UnreadableError(f"rules that recur, in a text that ends at {mark!r}")
        return [f"{name}: {first} {' '.join(close)}", *rules]
    if place is None:
        # a lazy lexeme ends at the first
        within = f"{first} & ~/(?s:.*){''.join(map(spelled, mark))}(?s:.*)/"
        return [f"{name}[lazy]: {name.upper()} {' '.join(close)}", f"{name.upper()}: {within}", *rules]
    # what stands before the special token is of the lexeme, which would take it in
    return [
        f"{name}: {name.upper()} {' '.join(close[place:])}",
        f"{name.upper()}: {' '.join((first, *close[:place]))}",
        *rules,
    ]


@lru_cache(maxsize=256)
def _written(grammar: LarkGrammar, prefix: str, spelling: Spelling) -> tuple[str, tuple[str, ...]]:
    """Return the expression of the whole, and the rules that it needs. Kept, for a conversation asks again."""
    writer = (_Lexemes if grammar.recurs else _OneLexeme)(grammar, prefix, spelling)
    first = writer.whole()
    return first, tuple(writer.lines)


class _Writer(ABC):
    """Writes expressions. Literal characters in a series are one string."""

    def __init__(self, grammar: LarkGrammar, prefix: str, spelling: Spelling) -> None:
        self._grammar = grammar
        self._spelling = spelling
        self.lines: list[str] = []
        self._names = {name: self._name_of(f"{prefix}_{i}", name) for i, name in enumerate(grammar.rules)}

    @abstractmethod
    def whole(self) -> str:
        """Return the text of all rules."""

    def _name_of(self, name: str, rule: str) -> str:
        """Return a rule's name in what is written: in capitals where it is of a lexeme."""
        return name.upper()

    def _written(self, expression: Expression) -> str:
        match expression:
            case Characters():
                return self._characters(expression)
            case Token(part):
                return self._token(part)
            case Name(name):
                return self._names[name]
            case Series(parts):
                return self._series(parts)
            case OneOf(options):
                return f"({' | '.join(map(self._written, options))})"
            case Repeat(most=0):
                return self._literal("")
            case Repeat(part, least, most):
                bounds = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most))
                bounds = bounds or f"{{{least},{'' if most is None else most}}}"
                return f"({self._written(part)}){bounds}"
        raise TypeError(expression)

    @abstractmethod
    def _token(self, part: Expression) -> str:
        """Return what stands for a lexeme."""

    def _series(self, parts: tuple[Expression, ...]) -> str:
        pieces: list[str] = []
        literal = ""
        for part in parts:
            if isinstance(part, Characters) and part.only is not None:
                literal += part.only
                continue
            if literal:
                pieces.append(self._literal(literal))
            literal = ""
            pieces.append(self._written(part))
        if literal or not pieces:
            pieces.append(self._literal(literal))
        return " ".join(pieces)

    def _literal(self, text: str) -> str:
        return json.dumps(self._spelling.of_text(text), ensure_ascii=False)

    def _characters(self, characters: Characters) -> str:
        if characters.only is not None:
            return self._literal(characters.only)
        return f"/{self._spelling.of_set(characters)}/"


class _OneLexeme(_Writer):
    """Writes all rules as parts of one lexeme."""

    def whole(self) -> str:
        self.lines += (
            f"{self._names[name]}: {self._written(rule)}" for name, rule in self._grammar.rules.items()
        )
        if self._grammar.ignored == NOTHING:
            return self._names[START]
        whole = f"{self._names[START]}_WHOLE"
        self.lines.append(f"{whole}: {self._token(NOTHING)} {self._names[START]}")
        return whole

    def _token(self, part: Expression) -> str:
        """Return a terminal and what is ignored behind it."""
        if self._grammar.ignored == NOTHING:
            return self._written(part)
        return f"{self._written(part)} {self._written(self._grammar.ignored)}"


class _Lexemes(_Writer):
    """Writes each terminal as a lexeme, which begins with what is ignored before it."""

    def __init__(self, grammar: LarkGrammar, prefix: str, spelling: Spelling) -> None:
        super().__init__(grammar, prefix, spelling)
        self._prefix = f"{prefix}_lexeme".upper()
        self._terminals = grammar.terminals
        self._lexemes: dict[Expression, str] = {}

    def whole(self) -> str:
        for name, rule in self._grammar.rules.items():
            self.lines.append(f"{self._names[name]}: {self._written(rule)}")
        if self._spelling.has_escapes:
            check_ends(tuple(self._lexemes))
        if not isinstance(self._grammar.ignored, Repeat):
            return self._names[START]
        last = self._lexeme(Repeat(self._grammar.ignored.part, 1, None))
        return f"{self._names[START]} {last}?"

    def _name_of(self, name: str, rule: str) -> str:
        return name.upper() if rule in self._grammar.terminals else name

    def _token(self, part: Expression) -> str:
        if not self._spelling.has_escapes:
            return self._lexeme(Series((self._grammar.ignored, part)))
        cut = cut_before_escapes(part, self._grammar.ignored, self._terminals)
        return self._of_lexemes(cut)

    def _of_lexemes(self, cut: Expression) -> str:
        match cut:
            case Token(part):
                return self._lexeme(part)
            case Series(parts):
                return " ".join(map(self._of_lexemes, parts))
            case OneOf(options):
                return f"({' | '.join(map(self._of_lexemes, options))})"
            case Repeat(part, least, most):
                bounds = {(0, None): "*", (0, 1): "?", (1, 1): ""}[least, most]
                return f"({self._of_lexemes(part)}){bounds}"
        raise TypeError(cut)

    def _lexeme(self, expression: Expression) -> str:
        name = self._lexemes.get(expression)
        if name is None:
            name = self._lexemes[expression] = f"{self._prefix}_{len(self._lexemes)}"
            self.lines.append(f"{name}: {self._written(expression)}")
        return name
