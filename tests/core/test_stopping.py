"""Stop strings across any cut of the text, and nothing of them ever released."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myserve.core.stopping import StopIds, StopMatcher

letters = st.text(alphabet="ab", max_size=40)
stops_of_letters = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[int, int] | None:
    """The stop that ends first, the longest of those: (start, end)."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - len(max(ending, key=len)), end
    return None


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(letters, stops_of_letters, st.lists(st.integers(0, 100), max_size=10))
def test_any_cut_of_the_text_gives_the_same(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    released, matched = "", None
    expected = first_match(text, stops)
    for piece in cut(text, cuts):
        freed = matcher.feed(piece)
        released += freed.text
        matched = freed.matched
        assert matcher.released == len(released)
        # nothing of the stop string that ends the text is ever out, however early the piece came
        assert expected is None or len(released) <= expected[0]
    if expected is None:
        assert matched is None
        released += matcher.flush()
        assert released == text
    else:
        assert matched == text[slice(*expected)]
        assert (len(released), len(released) + len(matched)) == expected
        assert released == text[: expected[0]]
        assert matcher.flush() == ""


@given(letters, stops_of_letters)
def test_holds_back_no_more_than_the_longest_beginning(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    if matcher.feed(text).matched is None:
        beginnings = [
            n for n in range(len(text) + 1) for stop in stops if n < len(stop) and text.endswith(stop[:n])
        ]
        assert len(text) - matcher.released == max(beginnings, default=0)


def test_a_matcher_that_holds_nothing_back_would_leak() -> None:
    """The control: releasing at once shows half of a stop string."""
    text, stop = "answer: 4</s>", "</s>"
    pieces = [text[:10], text[10:]]
    leaked = pieces[0]
    assert leaked.endswith("<")
    matcher = StopMatcher([stop])
    assert "".join(matcher.feed(piece).text for piece in pieces) == "answer: 4"


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.feed("one\n\ntwo") == ("one", "\n\n")
    assert matcher.feed("three") == ("", "\n\n")
    assert matcher.flush() == ""
    assert matcher.released == 3


def test_without_stop_strings_everything_is_released_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.feed("Zß🦄") == ("Zß🦄", None)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopMatcher(["a", ""])


@pytest.mark.parametrize(
    ("ignore_eos", "token_id", "ends", "reason"),
    [
        (False, 2, True, None),
        (True, 2, False, None),
        (False, 7, True, 7),
        (True, 7, True, 7),
        (False, 5, False, None),
    ],
)
def test_stop_ids(ignore_eos: bool, token_id: int, ends: bool, reason: int | None) -> None:
    ids = StopIds(eos_token_ids=[2, 3], stop_token_ids=[7], ignore_eos=ignore_eos)
    assert (token_id in ids) is ends
    assert ids.reason(token_id) == reason
