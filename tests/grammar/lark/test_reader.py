"""Lark's notation is read as Lark has it: what its rules derive, with what is ignored between tokens; or not at all."""

from __future__ import annotations

import pytest

from myserve.core.grammar import Grammar
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.lark.common import COMMON
from myserve.grammar.lark.expressions import UnreadableError
from myserve.grammar.lark.reader import read_lark
from myserve.grammar.lark.rules import AS_IS, written_in_json

EOS = 256
COMPILER = Compiler(
    Vocabulary([*(bytes([byte]) for byte in range(256)), b"<eos>"], frozenset([EOS]), (EOS,)),
    lambda text: list(text.encode()),
)

LINES = 'start: a\n  | "x" b -> other\n\n// a comment\na: "a"  # another\n?b: "b"\n!c: "c"'
TIMES = 'start: "a"~2 "b"~1..2 "c"{2} "d"{1,2} "e"{2,} ["f"] "g"? ("h" "i")*'
TERMINALS = 'start: WORD\nWORD: LETTER+ /[0-9]/i? "X"i\nLETTER: "a".."c" | "é"\n_U: "u"'
IGNORED = 'start: A A "b"\nA: "a" "x"?\n%ignore " "+\n%ignore /#[^\\n]*\\n/'
IMPORTS = "start: INT LF | N\n%import common.INT\n%import common (LF, WS)\n%import common.WORD -> N"
RECURSION = 'start: "(" start? ")" | left\nleft: left "a" | "b"'
# each grammar with texts that it derives, and others
READ: dict[str, tuple[str, list[str], list[str]]] = {
    "rules over lines": (LINES, ["a", "xb"], ["x", "b"]),
    "repetitions": (TIMES, ["aabccdee", "aabbccddeeefghihi"], ["abccdee", "aabccde", "aabccdeeh"]),
    "terminals": (TERMINALS, ["abX", "éx", "a1x"], ["dX", "X"]),
    "escapes": (r'start: "\"\\\n\t\x41é" /\/\d/', ['"\\\n\tAé/7'], ["7"]),
    "a dot and a dot of all": (r"start: /./ /./s", ["a\n", "ab"], ["\nb"]),
    "recursion": (RECURSION, ["(())", "(baa)", "b"], ["(()", "ab"]),
    "an empty option": ('start: "a" (| "b")', ["a", "ab"], ["b"]),
    "what is ignored": (IGNORED, ["aab", " a  axb ", "a#!\nab"], ["a a x b"]),
    "imports": (IMPORTS, ["12\n", "ab"], ["12"]),
    "lines of Windows": ('start: "a" b\r\nb: "b"\r\n', ["ab"], ["a"]),
    "a priority of a rule": ('start.2: "a"', ["a"], []),
}


def admits(source: str, text: str) -> bool:
    rules = "\n".join(written_in_json(read_lark(source), "said", spelling=AS_IS))
    return matches(f"start: said\n{rules}", text)


def matches(source: str, text: str) -> bool:
    matcher = COMPILER.compile(Grammar("lark", source))
    return all(matcher.consume_token(byte) for byte in text.encode()) and bool(matcher.is_accepting())


@pytest.mark.parametrize(("source", "derived", "others"), READ.values(), ids=READ)
def test_a_grammar_admits_what_it_derives(source: str, derived: list[str], others: list[str]) -> None:
    for text in derived:
        assert admits(source, text), text
    for text in others:
        assert not admits(source, text), text


NOT_READ = {
    "not lark at all!": "line 1",
    'begin: "a"': "'start'",
    "start: missing": "'missing', which is not defined",
    'start: "a\\*"': "in a string",
    'start: "a" }': "line 1: the end of a rule is wanted",
    'start: "a"\nstart: "b"': "two definitions",
    "start: %json {}": "line 1",
    'start[lazy]: "a"': "':' is wanted",
    "start: <[7]>": "line 1",
    'start: A & B\nA: "a"\nB: "b"': "line 1",
    'start: a{"b"}\na{x}: x': "a number is wanted",
    'start: A\nA.2: "a"': "priority of the terminal",
    'start: A\nA: "a" A?': "stands in itself",
    'start: A\nA: b\nb: "b"': "a rule in the terminal",
    "start: A\n%import other.A": "common alone",
    "start: A\n%import common.A": "not known",
    "%declare A\nstart: A": "%import or %ignore",
    'start: "ab".."c"': "range",
    'start: "a"~2..1': "right way round",
    r'start: "\ud800"': "half of a character",
    "start: /a(?=b)/": "look-around",
    f"start: {'(' * 5000}{')' * 5000}": "parentheses",
}


@pytest.mark.parametrize(("source", "words"), NOT_READ.items(), ids=range(len(NOT_READ)))
def test_what_is_not_known_is_not_read(source: str, words: str) -> None:
    with pytest.raises(UnreadableError, match=words):
        read_lark(source)


SAMPLES = [
    "",
    "1",
    "+1",
    "-1.5e3",
    ".5",
    "1.",
    "1e5",
    "a",
    "Zz",
    "_a1",
    "1a",
    '"a\\"b"',
    '"a"b"',
    " \t",
    "\n \r\f",
    "\r\n",
    "\n",
]


@pytest.mark.parametrize("name", COMMON)
def test_common_terminals_are_those_of_the_compiler(name: str) -> None:
    source = f"start: {name}\n%import common.{name}"
    try:
        COMPILER.compile(Grammar("lark", source))
    except ValueError:
        pytest.skip("the compiler has none of this name")
    for text in SAMPLES:
        assert admits(source, text) == matches(source, text), text
