"""A grammar written for a JSON string admits its texts' canonical spellings and nothing else; so up to a mark."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myserve.core.grammar import Grammar
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.lark.expressions import UnreadableError
from myserve.grammar.lark.json_escapes import canonical
from myserve.grammar.lark.reader import read_lark
from myserve.grammar.lark.rules import AS_IS, IN_JSON, Spelling, written_in_json, written_up_to

EOS = 256
SPECIAL = 257
COMPILER = Compiler(
    Vocabulary(
        [*(bytes([byte]) for byte in range(256)), b"<eos>", b"</v>"], frozenset([EOS, SPECIAL]), (EOS,)
    ),
    lambda text: list(text.encode()),
)

PATCH = r"""
start: begin hunk+ end
begin: "*** Begin" LF
end: "*** End" LF?
hunk: add | delete
add: "*** Add: " /(.+)/ LF ("+" /(.*)/ LF)+
delete: "*** Delete: " /(.+)/ LF
%import common.LF
"""
NESTED = r"""
start: item*
item: "(" item* ")" | STRING | NAME
STRING: /"[^"\n]*"/
NAME: /[a-z\\]+/
%ignore /[ \n]/
"""


def is_nested(text: str) -> bool:
    """Python's own reading of `NESTED`."""
    bare = re.sub(r'"[^"\n]*"', "", text)
    while (less := re.sub(r"\([a-z\\ \n]*\)", "", bare)) != bare:
        bare = less
    return re.fullmatch(r"[a-z\\ \n]*", bare) is not None


def of(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


Admits = Callable[[str], bool]
# grammars, each with what Python says of a text; their terminals' beginnings and ends share a backslash in JSON
GRAMMARS: dict[str, tuple[str, Admits]] = {
    "a patch": (PATCH, of(r"\*\*\* Begin\n(?:\*\*\* Add: .+\n(?:\+.*\n)+|\*\*\* Delete: .+\n)+\*\*\* End\n?")),
    "any text": (r"start: /(.|\n)*/", of(r"(?:.|\n)*")),
    "quotes or a line break": (r'start: /[a-z"]*/ LF /["\\]*/' + "\n%import common.LF", of(r'[a-z"]*\n["\\]*')),
    "none of these": (r'start: /[^"\\\n]+/ /[\x00-\x1f]/', of(r'[^"\\\n]+[\x00-\x1f]')),
    "nested": (NESTED, is_nested),
}  # fmt: skip
EACH = pytest.mark.parametrize(("source", "is_in"), GRAMMARS.values(), ids=GRAMMARS)
ALPHABET = 'ab"\\\n()+ \x1f\té\u2028🦄'


def in_json(source: str, spelling: Spelling = IN_JSON) -> str:
    rules = "\n".join(written_in_json(read_lark(source), "said", spelling=spelling))
    return f'start: "\\"" said "\\""\n{rules}'


def matches(source: str, text: str) -> bool:
    matcher = COMPILER.compile(Grammar("lark", source))
    return all(matcher.consume_token(byte) for byte in text.encode()) and bool(matcher.is_accepting())


def texts_of(source: str) -> st.SearchStrategy[str]:
    """Texts that a grammar has, texts near to them, and others."""
    some = st.text(ALPHABET, max_size=6)
    line = st.text(ALPHABET.replace("\n", ""), min_size=1, max_size=4)
    if source == PATCH:
        hunks = st.one_of(
            st.builds("*** Add: {}\n+{}\n".format, line, line), st.builds("*** Delete: {}\n".format, line)
        )
        return st.builds("*** Begin\n{}*** End{}".format, hunks, st.sampled_from(["", "\n", '"', "\\"]))
    if source == NESTED:
        leaf = st.sampled_from(["a", '"("', "\\", " ", "\n", '"\\"', '""'])
        tree = st.recursive(
            leaf, lambda inner: st.lists(inner, max_size=3).map(lambda x: f"({''.join(x)})"), max_leaves=6
        )
        return st.one_of(tree, st.builds(str.__add__, tree, st.sampled_from([*ALPHABET])), some)
    return st.one_of(some, st.builds("{}\n{}".format, some, some))


@EACH
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_is_admitted_in_its_canonical_spelling_where_the_grammar_has_it(
    source: str, is_in: Admits, data: st.DataObject
) -> None:
    text = data.draw(texts_of(source))
    assert matches(in_json(source), f'"{canonical(text)}"') == is_in(text), text


def walk(source: str, seed: int, most: int = 60) -> str | None:
    """Draw a text by the grammar's masks, as a model would; None: it did not end."""
    chosen = random.Random(seed)
    matcher = COMPILER.compile(Grammar("lark", source)).deep_copy()
    drawn = bytearray()
    while not matcher.is_accepting() or (
        len(drawn) < most and not matcher.is_stopped() and chosen.random() < 0.5
    ):
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]
        # near to the alphabet's end, so that a text of any length comes to one
        likely = [byte for byte in b'"\\\n()nrtu0+*abE' if byte in allowed]
        if not allowed or len(drawn) > 4 * most:
            break
        byte = chosen.choice(likely if likely and chosen.random() < 0.7 else allowed)
        assert matcher.consume_token(byte)
        drawn.append(byte)
    return drawn.decode() if matcher.is_accepting() else None


def drawn_texts_fit(source: str, is_in: Admits, spelling: Spelling) -> bool:
    """Return whether texts drawn by a grammar end, and are canonical JSON of texts that it has."""
    drawn = [text for seed in range(40) if (text := walk(in_json(source, spelling), seed)) is not None]
    return len(drawn) > 4 and all(_is_text_of(is_in, text) for text in drawn)


def _is_text_of(is_in: Admits, spelling: str) -> bool:
    try:
        text = json.loads(spelling)
    except json.JSONDecodeError:
        return False
    return is_in(text) and spelling == f'"{canonical(text)}"'


@EACH
def test_what_is_drawn_decodes_to_a_text_of_the_grammar(source: str, is_in: Admits) -> None:
    assert drawn_texts_fit(source, is_in, IN_JSON)


@EACH
def test_control_without_the_rewriting_it_does_not(source: str, is_in: Admits) -> None:
    assert not drawn_texts_fit(source, is_in, AS_IS)


def test_control_without_the_rewriting_a_spelling_is_not_admitted() -> None:
    text = '*** Begin\n*** Delete: "a"\n*** End'
    assert matches(in_json(PATCH), f'"{canonical(text)}"') and not matches(
        in_json(PATCH, AS_IS), f'"{canonical(text)}"'
    )


def test_control_terminals_as_lexemes_choose_at_the_common_backslash() -> None:
    r"""What lexemes that are cut before escapes are for: after `ab\` a lexer that never goes back waits for a quote."""
    by_terminals = 'start: A B\nA: /([a-z]|\\\\")*/\nB: "\\\\n"'
    assert not matches(by_terminals, r"ab\n")
    source = 'start: A B\nA: /[a-z"]*/\nB: "\\n"'
    assert matches(in_json(source), r'"ab\n"') and matches(in_json(source), r'"ab\"\n"')


# ---- as they are, up to a mark


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([*'a"\n<', "</v>", "</v", "/v>"]), max_size=6).map("".join))
def test_up_to_a_mark_no_text_holds_it(text: str) -> None:
    source = "start: v\n" + "\n".join(
        written_up_to(read_lark(r'start: /(.|\n)*/ | "q"'), "v", "</v>", ['"\\n</v>\\n"'])
    )
    assert matches(source, f"{text}\n</v>\n") == ("</v>" not in text)


REPEATED, RECURRING = r"start: /[a\n]*/", 'start: "a" start? | "\\n" start?'


@pytest.mark.parametrize(("source", "before"), [(REPEATED, ""), (REPEATED, "\n"), (RECURRING, "")])
@pytest.mark.parametrize("text", ["a", "a\n", "\n\na"])
def test_up_to_a_special_token_a_text_is_as_long_as_it_likes(source: str, before: str, text: str) -> None:
    close = [*([json.dumps(before)] if before else []), f"<[{SPECIAL}]>", '"\\n"']
    rules = "\n".join(written_up_to(read_lark(source), "v", "</v>", close))
    matcher = COMPILER.compile(Grammar("lark", f"start: v\n{rules}"))
    for token_id in [*f"{text}{before}".encode(), SPECIAL, *b"\n"]:
        assert matcher.consume_token(token_id)
    assert matcher.is_accepting()


@pytest.mark.parametrize("close", [['"</v>"'], ['"\\n"', f"<[{SPECIAL}]>"]])
def test_rules_that_recur_do_not_see_a_mark_of_characters(close: list[str]) -> None:
    with pytest.raises(UnreadableError, match="recur"):
        written_up_to(read_lark(NESTED), "v", "</v>", close)


def test_two_grammars_with_the_same_names_stand_side_by_side() -> None:
    both = [
        *written_in_json(read_lark("start: A\nA: /[ab]/"), "one"),
        *written_in_json(read_lark(NESTED), "two"),
    ]
    source = "start: one two\n" + "\n".join(both)
    assert matches(source, "a(b)") and not matches(source, "(b)")
