"""A lookup finds what a plain search over all texts finds, the longest match first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from myserve.engine.drafting.text_index import LONGEST_MATCH, PLACES, Match, TextIndex

texts = st.lists(st.integers(0, 3), max_size=30)


@given(first=texts, second=texts, pieces=st.lists(st.integers(0, 5), max_size=6))
def test_a_match_is_a_real_one_and_none_is_longer_among_the_latest(
    first: list[int], second: list[int], pieces: list[int]
) -> None:
    index = TextIndex()
    known = {index.add(first): first}
    number, own = index.add([]), second
    start = 0
    for piece in [*pieces, len(second)]:  # in pieces of any size
        index.extend(number, second[start : start + piece])
        start += piece
    known[number] = own
    match = index.match(number)
    seen = [
        (text, place)
        for text, tokens in known.items()
        for place in range(1, len(tokens))
        if own and tokens[place - 1] == own[-1]
    ]
    assert (match is None) == (not seen)
    if match is None:
        return
    tokens = known[match.text]
    length = _agreement(tokens[: match.position], own)
    assert match.length == min(length, LONGEST_MATCH)
    if len(seen) <= PLACES:
        assert match.length == max(min(_agreement(known[t][:p], own), LONGEST_MATCH) for t, p in seen)
    drafted = index.following(number, match, 5)
    assert drafted[: len(tokens) - match.position] == tuple(tokens[match.position : match.position + 5])


def _agreement(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return length


def test_a_loop_goes_round() -> None:
    index = TextIndex()
    text = index.add([9, 1, 2, 1, 2])
    match = index.match(text)
    assert match is not None
    assert index.following(text, match, 5) == (1, 2, 1, 2, 1)


def test_what_most_have_said_wins_among_equal_matches() -> None:
    index = TextIndex()
    for following in (7, 8, 8, 5):
        index.add([1, 2, 3, following])
    match = index.match(index.add([1, 2, 3]))
    assert match is not None
    assert match == Match(2, 3, 3)


def test_a_context_is_read_and_never_proposed() -> None:
    index = TextIndex()
    prompt = index.add([4, 5, 6])
    index.add([4, 5, 6, 7], context=3)
    match = index.match(index.add([4, 5], context=2))
    assert match is not None and match.text == prompt
