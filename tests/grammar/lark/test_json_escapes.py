"""A set of characters, rewritten, admits each of them in its canonical spelling and no other spelling."""

from __future__ import annotations

import json
import re

import pytest

from myserve.core.grammar import Grammar
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.lark.expressions import Characters
from myserve.grammar.lark.json_escapes import canonical, escaped_regex
from myserve.grammar.lark.regex import read_regex

EOS = 256
COMPILER = Compiler(
    Vocabulary([*(bytes([byte]) for byte in range(256)), b"<eos>"], frozenset([EOS]), (EOS,)),
    lambda text: list(text.encode()),
)
CHARACTERS = [*map(chr, range(128)), "é", "\u2028", "你", "🦄"]
SETS = [
    *(
        ".",
        r'["\\]',
        r"[\n-\r]",
        r'[^"]',
        r"[^\x00-\x1f]",
        r"[\s\S]",
        r"\s",
        r"\S",
        r"\W",
        r"[^\W\n]",
        r"[^\s]",
        r"\D",
    ),
    *(r"[\x1f-é]", r"\p{P}", r"\P{L}", r"[^\p{Cc}a]", r"[]\n]"),
]


def admits(regex: str, text: str) -> bool:
    matcher = COMPILER.compile(Grammar("lark", f"start: /{regex}/"))
    return all(matcher.consume_token(byte) for byte in text.encode()) and bool(matcher.is_accepting())


@pytest.mark.parametrize("source", SETS)
def test_a_set_has_the_canonical_spelling_of_each_of_its_characters(source: str) -> None:
    characters = read_regex(source)
    assert isinstance(characters, Characters)
    rewritten = escaped_regex(characters)
    for character in CHARACTERS:
        assert admits(rewritten, canonical(character)) == admits(characters.regex, character), character


@pytest.mark.parametrize("source", [".", r"[\s\S]", r'["\n/a]', r"[^b]"])
def test_no_other_spelling_is_admitted(source: str) -> None:
    characters = read_regex(source)
    assert isinstance(characters, Characters)
    rewritten = escaped_regex(characters)
    for spelling in (
        '"',
        "\n",
        "\x1f",
        r"\/",
        r"\u0022",
        r"\u000A",
        r"\u000a",
        r"\u001F",
        r"\u0061",
        "\\",
        r"\x61",
    ):
        assert not admits(rewritten, spelling), spelling


def test_canonical_is_what_json_writes_and_reads() -> None:
    for character in CHARACTERS:
        spelling = canonical(character)
        assert json.loads(f'"{spelling}"') == character
        assert (spelling != character) == bool(re.match(r'[\x00-\x1f"\\]', character))
