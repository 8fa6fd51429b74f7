"""Text is the tokenizer's own decoding, for every kind; where a table of bytes would be wrong, none is used."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from conftest import trained_tokenizer
from myserve.engine.token_bytes import TokenBytes, byte_level_alphabet
from myserve.engine.token_bytes.readers import Utf8Reader
from myserve.engine.token_bytes.spellings import spell_byte_level, spell_sentencepiece
from tokenizer_zoo import BYTEWISE, KINDS, SCRIPTS, known_ids, tokenizer, vocab_size

MISREAD = (
    "<résumé>",
    "đem",
    "čaj",
    "naïveté",
    "¡ñ!",
    "Ġx",
    "<ünï>",
)  # by the tokenizers library, where added


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def table(kind: str) -> TokenBytes:
    return TokenBytes(tokenizer(kind), vocab_size(kind))


def own_ids(kind: str) -> list[int]:
    """The ids on which the tokenizer's own decoding is right."""
    added = {str(token): i for i, token in tokenizer(kind).added_tokens_decoder.items()}
    if kind not in ("added_tokens", "holes"):
        return known_ids(kind)
    return sorted(set(known_ids(kind)) - {added[word] for word in MISREAD if word in added})


def random_lists(kind: str, count: int, length: int = 48) -> list[list[int]]:
    draw = random.Random(kind)
    return [draw.choices(own_ids(kind), k=draw.randint(1, length)) for _ in range(count)]


@cache
def letters(kind: str) -> list[int]:
    """Ids of a plain word, behind which a decoder does nothing special."""
    own = tokenizer(kind)
    spelled = (own.convert_ids_to_tokens([i])[0] for i in own_ids(kind))
    for i, token in zip(own_ids(kind), spelled, strict=True):
        if str(token).isascii() and own.decode([i]).isalpha() and "<0x" not in str(token):
            return [i]
    raise AssertionError("it has letters")


def continuation(kind: str, ids: list[int]) -> str:
    """What the tokenizer's own decoding adds for `ids` behind a word."""
    own, before = tokenizer(kind), letters(kind)
    text = own.decode([*before, *ids], skip_special_tokens=False)
    return str(text).removeprefix(own.decode(before))


def expected(kind: str, ids: list[int]) -> str:
    if kind in BYTEWISE:
        return continuation(kind, ids)
    return str(tokenizer(kind).decode(ids, skip_special_tokens=False))


def test_kinds_are_told_apart(kind: str, table: TokenBytes) -> None:
    assert table.is_bytewise == (kind in BYTEWISE)


def test_every_id_alone_has_the_tokenizers_own_text(kind: str, table: TokenBytes) -> None:
    before, own = letters(kind), tokenizer(kind)
    word = own.decode(before)
    for i in own_ids(kind):
        decoded = own.decode([i])
        here = own.decode([*before, i]).removeprefix(word) if kind in BYTEWISE else decoded
        assert table.text([i], skip_special_tokens=False) == here
        assert table.decode([i], skip_special_tokens=False) == decoded


def test_any_ids_have_the_tokenizers_own_text(kind: str, table: TokenBytes) -> None:
    for ids in random_lists(kind, 150):
        assert table.text(ids, skip_special_tokens=False) == expected(kind, ids)
        assert table.decode(ids, skip_special_tokens=False) == tokenizer(kind).decode(ids)


@pytest.mark.parametrize("script", SCRIPTS)
def test_real_text_in_every_script(kind: str, table: TokenBytes, script: str) -> None:
    ids = tokenizer(kind).encode(SCRIPTS[script], add_special_tokens=False)
    if not set(ids) <= set(own_ids(kind)):
        assert table.decode(ids) == SCRIPTS[script]  # with words that the library misreads
        return
    assert table.text(ids) == expected(kind, ids)
    assert table.decode(ids) == tokenizer(kind).decode(ids, skip_special_tokens=True)


def test_a_text_begins_with_the_space_that_its_first_token_has(kind: str, table: TokenBytes) -> None:
    for ids in random_lists(kind, 50):
        text, decoded = (
            table.text(ids, skip_special_tokens=False),
            table.decode(ids, skip_special_tokens=False),
        )
        assert text.lstrip(" ") == decoded.lstrip(" ")
        assert len(text) >= len(decoded)


def test_special_tokens_are_left_out_as_the_tokenizer_does_it(kind: str, table: TokenBytes) -> None:
    own = tokenizer(kind)
    special = sorted(table.special_ids)
    assert special
    for ids in random_lists(kind, 30):
        mixed = [i for pair in zip(ids, special * len(ids), strict=False) for i in pair]
        assert table.decode(mixed) == own.decode(mixed, skip_special_tokens=True)
        assert table.text(mixed) == table.text([i for i in mixed if i not in table.special_ids])


def test_padding_of_the_vocabulary_has_no_text(kind: str, table: TokenBytes) -> None:
    padding = sorted(set(range(vocab_size(kind))) - set(known_ids(kind)))
    assert padding
    ids = letters(kind)
    assert all(table[i] == b"" for i in padding)
    assert table.text([*padding, *ids, *padding]) == table.text(ids)
    assert table.decode([*padding, *ids, *padding]) == table.decode(ids)


@pytest.mark.parametrize("kind", ["holes", "added_tokens"])
def test_added_tokens_have_their_own_text(kind: str) -> None:
    own = tokenizer(kind)
    table = TokenBytes(own, vocab_size(kind))
    assert own.decode([own.convert_tokens_to_ids("čaj")]) != "čaj"  # the control: huggingface/tokenizers#1392
    for i, token in own.added_tokens_decoder.items():
        assert table[i] == str(token).encode()
        assert table.text([i, i], skip_special_tokens=False) == str(token) * 2
        assert table.decode([i, i], skip_special_tokens=False) == str(token) * 2


def test_ids_beyond_a_hole_have_text() -> None:
    own = tokenizer("holes")
    table = TokenBytes(own, vocab_size("holes"))
    beyond = [i for i in known_ids("holes") if i >= len(own)]
    assert beyond  # the control: a table of len(tokenizer) ids would lose them
    assert all(table[i] for i in beyond)


@pytest.mark.parametrize(
    ("kind", "spell"),
    [
        ("sentencepiece", spell_byte_level),
        ("wordpiece", spell_byte_level),
        ("end_of_word", spell_byte_level),
        ("wordpiece", spell_sentencepiece),
        ("byt5", spell_sentencepiece),
        ("unigram_bytes", spell_sentencepiece),
        ("added_tokens", spell_byte_level),
    ],
)
def test_a_table_without_proof_would_be_wrong(kind: str, spell: Any) -> None:
    """The control: bytes by one family's spelling, decoded as UTF-8, are not the text of these kinds."""
    own = tokenizer(kind)
    spelled = dict(zip(known_ids(kind), own.convert_ids_to_tokens(known_ids(kind)), strict=True))
    naive = [spell(spelled.get(i, "")) for i in range(vocab_size(kind))]
    table = TokenBytes(own, vocab_size(kind))
    wrong = 0
    for ids in random_lists(kind, 60):
        if kind == "added_tokens":
            ids = [*ids, own.convert_tokens_to_ids("čaj")]
        reader = Utf8Reader(naive, frozenset(), "replace")
        text = "".join([*map(reader.feed, ids), reader.end()])
        wrong += text != table.text(ids, skip_special_tokens=False)
    assert wrong > 30


def test_a_tokenizer_larger_than_the_model_is_cut(kind: str) -> None:
    small = TokenBytes(tokenizer(kind), 100)
    assert len(small) == 100
    assert max(small.special_ids, default=0) < 100


def test_byte_level_tokens_join_to_the_text() -> None:
    table = TokenBytes(trained_tokenizer(), 400)
    for text in [*SCRIPTS.values(), "Zß🦄你", "\x00\xff"]:
        token_ids = trained_tokenizer().encode(text, add_special_tokens=False)
        assert b"".join(table[i] for i in token_ids) == text.encode()


def test_the_alphabet_covers_every_byte_once() -> None:
    assert sorted(byte_level_alphabet().values()) == list(range(256))


def test_byte_tokens_have_their_byte() -> None:
    """Whatever the spelling: a grammar and a logprob's `bytes` need what half a character is."""
    for kind in ("byte_level", "tekken", "sentencepiece", "unigram_bytes", "byt5", "tiktoken_python"):
        table = TokenBytes(tokenizer(kind), vocab_size(kind))
        assert {data[0] for data in table if len(data) == 1} == set(range(256)), kind


def test_no_token_of_a_complete_vocabulary_stands_for_more_text_than_the_longest() -> None:
    for kind in ("byte_level", "tekken", "sentencepiece"):
        table = TokenBytes(tokenizer(kind), vocab_size(kind))
        assert table.longest == max(map(len, table))
        for text in (*SCRIPTS.values(), "aaaa" * 99, " " * 99):
            assert len(text.encode()) <= table.longest * len(tokenizer(kind).encode(text))
    for kind in ("wordpiece", "unigram_bytes"):  # a word of any length is unknown, a normalizer drops letters
        assert TokenBytes(tokenizer(kind), vocab_size(kind)).longest >= 1024


def test_a_vocabulary_that_raises_for_unknown_words_is_proved_on_its_ids() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<none>"))
    own = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(Exception, match="UNK"):
        own.encode("what it has not")
    assert TokenBytes(own, 4).text([0, 1, 3, 0]) == "a b a" == own.decode([0, 1, 0])
