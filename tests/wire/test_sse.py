"""The decoder gives the same events for every way of cutting the same bytes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myserve.wire.sse import DONE, ServerSentEvent, SSEDecoder, encode_event

STREAM = (
    b"\xef\xbb\xbf: a comment\r\n"
    b'data: {"t": "Z\xc3\x9f\xf0\x9f\xa6\x84\xe4\xbd\xa0"}\r\n\r\n'
    b"event: error\rdata: one\rdata:two\r\r"
    b"event: no data, no event\n\n\n\n"
    b"id: 7\nretry: 10\ndata\n\n"
    b"data:  two spaces\n\ndata: [DONE]\n\n"
)
EVENTS = [
    ServerSentEvent('{"t": "Zß🦄你"}'),
    ServerSentEvent("one\ntwo", "error"),
    ServerSentEvent("", "message", "7"),
    ServerSentEvent(" two spaces", "message", "7"),
    ServerSentEvent("[DONE]", "message", "7"),
]


def decode(chunks: list[bytes]) -> list[ServerSentEvent]:
    decoder, data = SSEDecoder(), SSEDecoder()
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    raw = [d for chunk in chunks for d in data.feed_data(chunk)]
    assert [d.decode("utf-8", "replace") for d in raw] == [event.data for event in events]
    return events


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    edges = [0, *sorted(borders), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def test_the_whole_stream_at_once() -> None:
    assert decode([STREAM]) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_of_a_fixed_size(size: int) -> None:
    assert decode([STREAM[i : i + size] for i in range(0, len(STREAM), size)]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_borders(borders: list[int]) -> None:
    assert decode(cut(STREAM, borders)) == EVENTS


def test_a_decoder_that_forgets_between_chunks_would_fail() -> None:
    """The control: without the buffer the cut stream loses events."""
    forgetful = [event for i in range(len(STREAM)) for event in SSEDecoder().feed(STREAM[i : i + 1])]
    assert forgetful != EVENTS


@given(st.lists(st.text(), max_size=5), st.data())
def test_what_is_encoded_is_decoded(texts: list[str], data: st.DataObject) -> None:
    """JSON of any text survives: the encoder's output cut anywhere gives the same objects back."""
    stream = b"".join(encode_event(json.dumps({"text": text}, ensure_ascii=False)) for text in texts) + DONE
    borders = data.draw(st.lists(st.integers(0, len(stream)), max_size=6))
    *events, last = decode(cut(stream, borders))
    assert [event.json()["text"] for event in events] == texts
    assert last.is_done


@given(st.text(alphabet="ab\n\r"))
def test_lines_are_kept(text: str) -> None:
    (event,) = decode([encode_event(text, event="note")])
    assert event == ServerSentEvent(text.replace("\r\n", "\n").replace("\r", "\n"), "note")


@given(
    st.lists(st.binary(max_size=12) | st.sampled_from([b"\n", b"\r", b"data:", b"\xef\xbb\xbf", b"id: 1"]))
)
def test_any_bytes_in_any_cut_are_the_same_events(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    assert decode(chunks) == decode([whole]) == decode([whole[i : i + 1] for i in range(len(whole))])


def test_a_cut_stream_says_so() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: whole\n\ndata: half") == [ServerSentEvent("whole")]
    assert decoder.pending
    assert decoder.feed(b" more\n\n") == [ServerSentEvent("half more")]
    assert not decoder.pending


@pytest.mark.parametrize(
    "block", [b"data: \xff\xfe\n\n", b"event: x\ndata: \xff\xfe\n\n", b": c\n\ndata: \xff\xfe\n\n"]
)
def test_data_that_is_not_utf8_comes_as_it_is(block: bytes) -> None:
    assert SSEDecoder().feed_data(block) == [b"\xff\xfe"]
    assert [event.data for event in SSEDecoder().feed(block)] == ["\ufffd\ufffd"]
