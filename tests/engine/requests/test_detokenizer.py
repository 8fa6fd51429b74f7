"""Text from ids: whole characters, whole tokens, no piece of a stop string, and nothing lost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import trained_tokenizer
from myserve.core.params import SamplingParams
from myserve.engine.outputs import TokenOutput
from myserve.engine.requests.detokenizer import Detokenizer, ReleasedText
from myserve.engine.token_bytes import TokenBytes
from tokenizer_zoo import BYTEWISE, KINDS, SCRIPTS, known_ids, tokenizer, vocab_size

TABLE = TokenBytes(trained_tokenizer(), 400)
END = 2  # <|im_end|>


def ids(text: str) -> list[int]:
    return list(trained_tokenizer().encode(text, add_special_tokens=False))


def token(token_id: int) -> TokenOutput:
    return TokenOutput(token_id, logprob=-1.0, sampling_logprob=-1.0)


def detokenize(token_ids: list[int], table: TokenBytes = TABLE, **params: object) -> list[ReleasedText]:
    """Everything that is released, up to a match or the end."""
    detokenizer = Detokenizer(table, SamplingParams(**params))
    released = []
    for token_id in token_ids:
        released.append(detokenizer.feed(token(token_id)))
        if released[-1].matched is not None:
            return released
    return [*released, detokenizer.end()]


def text_of(released: list[ReleasedText]) -> str:
    return "".join(r.text for r in released)


def shown(released: list[ReleasedText]) -> list[int]:
    return [t.token_id for r in released for t in r.tokens]


def hidden(released: list[ReleasedText]) -> list[int]:
    return [t.token_id for r in released for t in r.stop_tokens]


@given(st.text())
def test_any_text_comes_back_in_whole_characters(text: str) -> None:
    token_ids = ids(text)
    released = detokenize(token_ids)
    assert text_of(released) == text
    assert shown(released) == token_ids
    assert all("\ufffd" not in r.text for r in released) or "\ufffd" in text


@given(st.lists(st.integers(0, 399)))
def test_any_ids_give_the_text_of_their_bytes(token_ids: list[int]) -> None:
    released = detokenize(token_ids)
    assert text_of(released) == TABLE.text(token_ids) == trained_decode(token_ids)
    assert shown(released) == token_ids


def trained_decode(token_ids: list[int]) -> str:
    known = [i for i in token_ids if i < len(trained_tokenizer())]
    return str(trained_tokenizer().decode(known, skip_special_tokens=True))


@given(
    st.text(alphabet="ab你🦄 ", max_size=30),
    st.lists(st.text(alphabet="ab你🦄 ", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_where_the_first_stop_string_ends(text: str, stops: list[str]) -> None:
    released = detokenize(ids(text), stop=tuple(stops))
    ends = [(text.index(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        assert (text_of(released), released[-1].matched) == (text, None)
    else:
        end, _, stop = min(ends)
        assert (text_of(released), released[-1].matched) == (text[: end - len(stop)], stop)
    assert shown(released) + hidden(released) == ids(text)[: len(shown(released) + hidden(released))]


def test_half_a_character_waits_for_the_other_half() -> None:
    unicorn = [TABLE_OF_BYTES[b] for b in "🦄".encode()]
    released = detokenize(unicorn)
    assert [r.text for r in released] == ["", "", "", "🦄", ""]
    assert [len(r.tokens) for r in released] == [0, 0, 0, 4, 0]


def test_half_a_character_at_the_end_is_told_as_such() -> None:
    released = detokenize([TABLE_OF_BYTES[b] for b in "🦄".encode()[:3]])
    assert (text_of(released), len(shown(released))) == ("\ufffd", 3)


def test_the_tokens_of_a_stop_string_are_kept_apart() -> None:
    text = [TABLE_OF_BYTES[b] for b in b"abSTOPcd"]
    released = detokenize(text, stop=("STOP",))
    assert (text_of(released), shown(released), hidden(released)) == ("ab", text[:2], text[2:6])


def test_a_stop_string_may_be_shown() -> None:
    text = [TABLE_OF_BYTES[b] for b in b"abSTOPcd"]
    released = detokenize(text, stop=("STOP",), include_stop_str_in_output=True)
    assert (text_of(released), shown(released), hidden(released)) == ("abSTOP", text[:6], [])


def test_min_tokens_come_before_any_stop_string() -> None:
    text = [TABLE_OF_BYTES[b] for b in b"aXaaXb"]
    released = detokenize(text, stop=("X",), min_tokens=3)
    assert text_of(released) == "aXaa"


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    token_ids = [*ids("a"), END, *ids("b")]
    assert text_of(detokenize(token_ids)) == "ab"
    assert text_of(detokenize(token_ids, skip_special_tokens=False)) == "a<|im_end|>b"
    assert shown(detokenize(token_ids)) == token_ids


def test_a_stop_token_is_the_last_of_all_and_has_no_text() -> None:
    detokenizer = Detokenizer(TABLE, SamplingParams(stop=("xyz",)))
    detokenizer.feed(token(TABLE_OF_BYTES[ord("x")]))
    released = detokenizer.end(token(END))
    assert (released.text, hidden([released])) == ("x", [END])


TABLE_OF_BYTES = {TABLE[i][0]: i for i in range(400) if len(TABLE[i]) == 1}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def table(kind: str) -> TokenBytes:
    return TokenBytes(tokenizer(kind), vocab_size(kind))


def lists(kind: str) -> list[list[int]]:
    draw = random.Random(kind)
    texts = [tokenizer(kind).encode(text, add_special_tokens=False) for text in SCRIPTS.values()]
    return [*texts, *(draw.choices(known_ids(kind), k=40) for _ in range(20))]


def bytes_of(released: list[ReleasedText], table: TokenBytes) -> bytes:
    """What logprobs entries say of the tokens of the text."""
    tokens = [token for r in released for token in r.tokens]
    return b"".join(table[t.token_id] if t.text_bytes is None else t.text_bytes for t in tokens)


def test_every_kind_streams_what_it_reads_as_a_whole(kind: str, table: TokenBytes) -> None:
    for token_ids in lists(kind):
        released = detokenize(token_ids, table, skip_special_tokens=False)
        assert text_of(released) == table.text(token_ids, skip_special_tokens=False)
        assert shown(released) == token_ids


def test_every_kinds_bytes_are_its_texts(kind: str, table: TokenBytes) -> None:
    for token_ids in lists(kind):
        released = detokenize(token_ids, table, skip_special_tokens=False)
        text, joined = text_of(released), bytes_of(released, table)
        if kind not in BYTEWISE or "\ufffd" not in text:
            assert joined == text.encode() or (kind == "byt5" and joined.decode("utf-8", "ignore") == text)


def test_every_kind_ends_where_the_first_stop_string_ends(kind: str, table: TokenBytes) -> None:
    draw = random.Random(kind)
    for token_ids in lists(kind):
        text = table.text(token_ids)
        if len(text) < 4:
            continue
        begin = draw.randrange(1, len(text) - 2)
        stop = text[begin : begin + draw.randint(1, 3)]
        if "\ufffd" in stop:
            continue  # it may be half a character that is held back, or a whole one
        released = detokenize(token_ids, table, stop=(stop,))
        assert (text_of(released), released[-1].matched) == (text[: text.index(stop)], stop)
        seen = shown(released) + hidden(released)
        assert seen == token_ids[: len(seen)]
        kept = detokenize(token_ids, table, stop=(stop,), include_stop_str_in_output=True)
        assert text_of(kept) == text[: text.index(stop) + len(stop)]


def test_where_a_tokens_bytes_depend_on_its_place_it_has_those_of_its_place() -> None:
    table = TokenBytes(tokenizer("wordpiece"), vocab_size("wordpiece"))
    token_ids = tokenizer("wordpiece").encode("the dog the", add_special_tokens=False)
    tokens = [t for r in detokenize(token_ids, table) for t in r.tokens]
    first, last = tokens[0], tokens[-1]
    assert first.token_id == last.token_id
    assert (first.text_bytes, last.text_bytes) == (b"the", b" the")
