"""A regular expression means what Python's `re` says of it, or it is not read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myserve.core.grammar import Grammar
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.lark.expressions import UnreadableError
from myserve.grammar.lark.reader import read_pattern
from myserve.grammar.lark.rules import AS_IS, written_in_json

EOS = 256
COMPILER = Compiler(
    Vocabulary([*(bytes([byte]) for byte in range(256)), b"<eos>"], frozenset([EOS]), (EOS,)),
    lambda text: list(text.encode()),
)
ALPHABET = 'ab"\\\n{]-/\x1f0é'


def admits(source: str, text: str) -> bool:
    rules = "\n".join(written_in_json(read_pattern(source), "said", spelling=AS_IS))
    matcher = COMPILER.compile(Grammar("lark", f"start: said\n{rules}"))
    return all(matcher.consume_token(byte) for byte in text.encode()) and bool(matcher.is_accepting())


SAME = [
    r"a|b*", r"(a|b)+0?", r"(?:ab){2}", r"(?P<n>a{1,2})b{2,}", r"[a-b\]]+", r"[]a]+", r"[^]a]*", r"[-a]+", r"[a-]+",
    r"\x61\u0062", r"\{\}", r"\/a", r"[\"\\/]+", r"a|", r"", r"()", r".+", r"[\n\x1f]*", r"a{0}b", r"^a|b$", r"\\\n",
]  # fmt: skip


@pytest.mark.parametrize("source", SAME)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_it_admits_what_python_s_does(source: str, data: st.DataObject) -> None:
    pattern = re.compile(source)
    text = data.draw(st.one_of(st.text(ALPHABET, max_size=5), st.from_regex(pattern, fullmatch=True)))
    assert admits(source, text) == (pattern.fullmatch(text) is not None)


NOT_READ = {
    "(?=a)": "look-around",
    "(?<!a)b": "look-around",
    "(?i)a": "flags inside",
    r"\bword": r"\\b",
    r"(a)\1": r"\\1",
    "a*?": "lazy",
    "a*+": "lazy",
    "a{2}{3}": "lazy",
    "a{x": "'{'",
    "^a": r"'\^'",
    "[a[b]]": "class",
    "[a&&b]": "class",
    "[b-a]": "wrong way round",
    "a{2,1}": "wrong way round",
    r"[\d-z": "class",
    "(a": "open group",
    "a)": "unopened",
    "[a": "open class",
    r"\ud800": "no character",
    "\\": "\\\\",
    r"\p{Greek}": "p",
}


@pytest.mark.parametrize(("source", "words"), NOT_READ.items())
def test_what_is_read_in_two_ways_or_is_no_set_of_texts_is_not_read(source: str, words: str) -> None:
    with pytest.raises(UnreadableError, match=words):
        read_pattern(f"(?:{source})" if source == "^a" else source)
