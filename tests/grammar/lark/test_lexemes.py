"""A terminal is cut before the escapes with which it may go on; one that cannot be is not read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myserve.core.grammar import Grammar
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.lark.expressions import UnreadableError
from myserve.grammar.lark.json_escapes import canonical
from myserve.grammar.lark.lexemes import escapes_that_go_on
from myserve.grammar.lark.reader import read_lark
from myserve.grammar.lark.regex import read_regex
from myserve.grammar.lark.rules import written_in_json

EOS = 256
COMPILER = Compiler(
    Vocabulary([*(bytes([byte]) for byte in range(256)), b"<eos>"], frozenset([EOS]), (EOS,)),
    lambda text: list(text.encode()),
)
GO_ON = {
    '"[^"]*"': "",
    r'"(?:[^"\\]|\\.)*"': "",
    "[a-z]+": "",
    '[a-z"]+': '"',
    'a|a"b': '"',
    'é|ü"b': '"',  # all beyond ASCII are taken for one
    '[0-9]+|b"c': "",
    'a"?': '"',
    'a"{2,3}': '"',
    "a(b\n)*": "",
    "a(\nb)*": "\n",
    '(?:"a)?': '"',
}


@pytest.mark.parametrize(("source", "escapes"), GO_ON.items())
def test_with_which_escapes_a_whole_text_goes_on(source: str, escapes: str) -> None:
    assert escapes_that_go_on(read_regex(source)) == frozenset(escapes)


# terminals around which rules recur, so that each is a lexeme, or several
LOOPS = [
    r'/[a-z"]*/',
    r'/[a-z"]+/',
    r'/#[a"\\]*/',
    r'/#[a"]+/',
    r'/["\n]+/',
    r"/[a-z]+/",
    r'/"[^"\n]*"/',
    r"/[^ \n)(.]+/",
]
ALPHABET = 'a#"\\\n'


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("ignored", ["", "\n%ignore / +/"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_cut_terminal_has_the_texts_that_it_had(loop: str, ignored: str, data: st.DataObject) -> None:
    """The rules that recur and do not are written in two ways, and one line break ends the terminal in both."""
    body = f'A LF* "."\nA: {loop}\nLF: "\\n"{ignored}'
    recurring, regular = (f"start: {head} {body}" for head in ('"(" start ")" |', ""))
    spaces = st.text(" ", max_size=2) if ignored else st.just("")
    drawn = st.tuples(
        spaces, st.from_regex(loop[1:-1], fullmatch=True) | st.text(ALPHABET, max_size=4), spaces
    )
    text = "".join(data.draw(drawn)) + data.draw(st.sampled_from([".", "\n.", "\n\n.", "", "a."]))
    assert admits(recurring, text) == admits(regular, text), text


def admits(source: str, text: str) -> bool:
    rules = "\n".join(written_in_json(read_lark(source), "said"))
    matcher = COMPILER.compile(Grammar("lark", f"start: said\n{rules}"))
    whole = canonical(text).encode()
    return all(matcher.consume_token(byte) for byte in whole) and bool(matcher.is_accepting())


@pytest.mark.parametrize("terminal", [r'/"a?/ | /b"*c*/', r'/a("b)*/', r'/a"*b?"*/', r'/a"{0,3}/'])
def test_what_cannot_be_cut_is_not_read(terminal: str) -> None:
    with pytest.raises(UnreadableError, match="where rules recur"):
        written_in_json(read_lark(f'start: "(" start ")" | A\nA: {terminal}'), "said")
    written_in_json(read_lark(f"start: A\nA: {terminal}"), "said")  # where none does, all is one lexeme


@pytest.mark.parametrize("rest", ['A: /[a ]+/\nB: "\\""\n%ignore / +/', 'A: /[a-z]+/\nB: "ab\\""'])
def test_two_terminals_of_which_one_goes_on_are_not_read(rest: str) -> None:
    """At a backslash behind the first a lexer waits for the second's quote, though a line break may come."""
    with pytest.raises(UnreadableError, match="where rules recur"):
        written_in_json(read_lark(f'start: "(" start ")" | A "\\n" | B\n{rest}'), "said")


def test_a_terminal_of_many_characters_is_not_analysed() -> None:
    with pytest.raises(UnreadableError, match="great many"):
        escapes_that_go_on(read_regex('(?:[a"]{99}){99}'))


def test_an_empty_terminal_takes_nothing_in() -> None:
    source = 'start: "(" start ")" | ""\n%ignore /[ \\n]/'
    assert admits(source, "( (\n) )\n") and not admits(source, "( (\n) ")
