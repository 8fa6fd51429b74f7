r"""A set of characters as a JSON string has them: by its one canonical escape each that needs one, others as they are.

Canonical is what `json.dumps` writes: `\"`, `\\`, `\b`, `\f`, `\n`, `\r`, `\t`, and `\u001f` with small digits. One
escape a character makes the rewriting one to one: a text has one spelling, and a spelling one text.
"""

from __future__ import annotations

import json
from itertools import groupby

from myserve.grammar.lark.expressions import ESCAPED_IN_JSON, Characters

__all__ = ["canonical", "escaped_regex", "plain_of"]

_PLAIN = r'[^"\\\x00-\x1f]'


def canonical(text: str) -> str:
    r"""Return a text as it stands in a JSON string.

    >>> print(canonical('"a"\n\x1f é'))
    \"a\"\n\u001f é
    """
    return json.dumps(text, ensure_ascii=False)[1:-1]


def escaped_regex(characters: Characters) -> str:
    r"""Return the regular expression of one character of a set, in a JSON string.

    >>> print(escaped_regex(Characters("a\\x{a}\\x{1f}", frozenset("a\n\x1f"), goes_beyond=False)))
    (?:[[a\x{a}\x{1f}]&&[^"\\\x00-\x1f]]|\\n|\\u001[f])
    """
    options = []
    if characters.has_plain:
        plain = f"[{characters.members}]"
        if characters.escaped or characters.members.startswith("^"):
            plain = f"[{plain}&&{_PLAIN}]"
        options.append(f"(?i:{plain})" if characters.ignores_case else plain)
    options += _escapes(characters.escaped)
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def plain_of(characters: Characters) -> Characters:
    """Return those of a set that stand in a JSON string as they are."""
    members = f"[{characters.members}]&&{_PLAIN}"
    return Characters(
        members, characters.ascii - ESCAPED_IN_JSON, characters.goes_beyond, characters.ignores_case
    )


def _escapes(characters: frozenset[str]) -> list[str]:
    spelled = sorted(canonical(character).replace("\\", r"\\") for character in characters)
    longest = len(r"\\u001f")
    short = [spelling for spelling in spelled if len(spelling) < longest]
    by_tens = groupby((s for s in spelled if len(s) == longest), key=lambda spelling: spelling[:-1])
    return short + [f"{begin}[{''.join(spelling[-1] for spelling in same)}]" for begin, same in by_tens]
