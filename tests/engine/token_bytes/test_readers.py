"""What a reader has returned is final: joined it is the whole text, wherever the ids are cut."""

from __future__ import annotations

import random

import pytest

from myserve.engine.token_bytes import TokenBytes
from myserve.engine.token_bytes.readers import WINDOW_TOKENS, OwnReader, hold_cleaned, hold_halves
from tokenizer_zoo import KINDS, SCRIPTS, known_ids, tokenizer, vocab_size


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def table(kind: str) -> TokenBytes:
    return TokenBytes(tokenizer(kind), vocab_size(kind))


def lists(kind: str, count: int, longest: int = 3 * WINDOW_TOKENS) -> list[list[int]]:
    draw = random.Random(kind)
    texts = [tokenizer(kind).encode(text, add_special_tokens=False) for text in SCRIPTS.values()]
    return [*texts, *(draw.choices(known_ids(kind), k=draw.randint(1, longest)) for _ in range(count))]


def test_text_comes_as_it_is_read_and_ends_as_the_whole(kind: str, table: TokenBytes) -> None:
    for ids in lists(kind, 40):
        reader = table.reader(skip_special_tokens=False)
        parts = [reader.feed(i) for i in ids]
        assert "".join([*parts, reader.end()]) == table.text(ids, skip_special_tokens=False)
        assert not reader.pending


def test_most_text_is_not_held_back(kind: str, table: TokenBytes) -> None:
    """The control of the line above: a reader that returned all at the end would pass it."""
    ids = tokenizer(kind).encode(SCRIPTS["Latin"], add_special_tokens=False)
    reader = table.reader()
    early = "".join(reader.feed(i) for i in ids)
    held = len(table.text(ids)) - len(early)
    assert held <= 3 if kind != "backwards" else early == ""


def test_positions_are_where_tokens_stand_in_the_text(kind: str, table: TokenBytes) -> None:
    for ids in lists(kind, 5):
        shown = table.decode(ids, skip_special_tokens=False)
        places = table.places(ids, shown, skip_special_tokens=False)
        begins = [begin for begin, _ in places]
        assert begins == sorted(begins)
        assert all(0 <= begin <= len(shown) for begin in begins)
        for token_id, (begin, here) in zip(ids, places, strict=True):
            alone = (table[token_id] if here is None else here).decode("utf-8", "replace")
            if "\ufffd" not in alone and not _in_broken_run(table, ids):
                assert shown[begin:].startswith(alone)


def _in_broken_run(table: TokenBytes, ids: list[int]) -> bool:
    """A run of byte tokens that is no UTF-8 is U+FFFD for each, its letters too."""
    return "\ufffd" in table.text(ids)


def test_a_window_forgets_nothing_that_matters() -> None:
    own = tokenizer("wordpiece_cleaned")
    ids = own.encode("it isn't so , he said : do n't ! " * 40, add_special_tokens=False)
    for stable, is_right in ((hold_cleaned, True), (hold_halves, False)):  # the second is the control
        reader = OwnReader(own.decode, frozenset(), stable)
        text = "".join([*map(reader.feed, ids), reader.end()])
        assert (text == own.decode(ids)) == is_right
