"""Server-sent events in both directions: what `encode_event` writes, `SSEDecoder` reads, however cut."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import orjson

__all__ = ["DONE", "DONE_DATA", "KEEP_ALIVE", "SSEDecoder", "ServerSentEvent", "encode_event"]

DONE_DATA = "[DONE]"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: no event, and no client sees it

_ANY_NEWLINE = re.compile(rb"\r\n|\r|\n")


class ServerSentEvent(NamedTuple):
    """One event of a stream. `event` is "message" unless the sender named it.

    >>> ServerSentEvent('{"a": 1}').json()
    {'a': 1}
    >>> ServerSentEvent("[DONE]").is_done
    True
    """

    data: str
    event: str = "message"
    id: str | None = None

    @property
    def is_done(self) -> bool:
        return self.data == DONE_DATA

    def json(self) -> Any:
        """The data as a JSON value; `orjson.JSONDecodeError` (a ValueError) when it is none."""
        return orjson.loads(self.data)


def encode_event(data: str | bytes, event: str | None = None) -> bytes:
    r"""Return one event, ready for the socket. Data of several lines becomes several `data:` fields.

    >>> encode_event('{"a": 1}')
    b'data: {"a": 1}\n\n'
    >>> encode_event("two\nlines", event="error")
    b'event: error\ndata: two\ndata: lines\n\n'
    """
    raw = data.encode() if isinstance(data, str) else data
    if b"\n" in raw or b"\r" in raw:
        raw = b"\ndata: ".join(_ANY_NEWLINE.split(raw))
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + raw + b"\n\n"


class SSEDecoder:
    r"""Bytes in, whole events out. A chunk may end anywhere: inside a UTF-8 character, between `\r` and `\n`.

    Follows the WHATWG standard's grammar: LF, CR and CRLF line ends, a byte order mark, comments, several
    `data:` fields joined by newlines, no event without data, and an unfinished event at the end is dropped
    (`pending` says that there was one: the stream was cut).

    >>> decoder = SSEDecoder()
    >>> decoder.feed(b'data: {"text": "h\xc3')
    []
    >>> [event.data for event in decoder.feed(b'\xa9"}\r\n\r\ndata: [DONE]\n\n')]
    ['{"text": "hé"}', '[DONE]']
    >>> decoder.pending
    False
    """

    __slots__ = ("_after_cr", "_at_start", "_buffer", "_last_id")

    def __init__(self) -> None:
        self._buffer = bytearray()  # newlines are all \n in here
        self._after_cr = False
        self._at_start = True
        self._last_id: str | None = None

    @property
    def pending(self) -> bool:
        """True when bytes of an unfinished event are held."""
        return bool(self._buffer.strip(b"\n"))

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that `chunk` completes, in order."""
        return [event for event in map(self._parse, self._blocks(chunk)) if event is not None]

    def feed_data(self, chunk: bytes) -> list[bytes]:
        r"""Return the bytes of each event's data, as they came: less work where text, names and ids are not needed.

        Bytes that are not UTF-8 are left to the reader, which must not take replaced characters for what was sent.

        >>> SSEDecoder().feed_data(b"data: [1]\n\nevent: error\ndata: [2]\n\n: a comment\n\n")
        [b'[1]', b'[2]']
        """
        whole = self._whole_blocks(chunk)
        if whole.startswith(b"data: "):
            data = whole[6:].split(b"\n\ndata: ")
            # one-line data and nothing else: no look at each one
            if whole.count(b"\n") == 2 * (len(data) - 1):
                return data
        fields = [self._fields(block) for block in whole.split(b"\n\n")]
        return [event[0] for event in fields if event is not None]

    def _blocks(self, chunk: bytes) -> list[bytes]:
        return self._whole_blocks(chunk).split(b"\n\n")

    def _whole_blocks(self, chunk: bytes) -> bytes:
        """Return what is complete by now, without the blank line at its end; newlines are all \n."""
        # A search for the blank line starts where the last one ended: many small chunks stay linear.
        searched = max(0, len(self._buffer) - 1)
        self._buffer += self._with_lf_only(chunk)
        if self._at_start and not self._drop_byte_order_mark():
            return b""
        end = self._buffer.rfind(b"\n\n", searched)
        if end < 0:
            return b""
        whole = bytes(memoryview(self._buffer)[:end])
        del self._buffer[: end + 2]
        return whole

    def _with_lf_only(self, chunk: bytes) -> bytes:
        if not chunk:
            return chunk
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the second half of a CRLF that was cut in two
            self._after_cr = False
            if not chunk:
                return chunk
        self._after_cr = chunk.endswith(b"\r")
        if b"\r" not in chunk:  # what our own server sends
            return chunk
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _drop_byte_order_mark(self) -> bool:
        """False while the first bytes may still become a byte order mark."""
        mark = b"\xef\xbb\xbf"
        if len(self._buffer) < len(mark) and mark.startswith(self._buffer):
            return False
        if self._buffer.startswith(mark):
            del self._buffer[: len(mark)]
        self._at_start = False
        return True

    def _parse(self, block: bytes) -> ServerSentEvent | None:
        fields = self._fields(block)
        if fields is None:
            return None
        data, name = fields
        return ServerSentEvent(_text(data), _text(name) or "message", self._last_id)

    def _fields(self, block: bytes) -> tuple[bytes, bytes] | None:
        """Return an event's data and name, or None for a block without data; note its id."""
        if block.startswith(b"data: ") and b"\n" not in block:  # nearly every event is this
            return block[6:], b""
        data: list[bytes] = []
        name = b""
        for line in block.split(b"\n"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value
            elif field == b"id" and b"\0" not in value:
                self._last_id = _text(value)
        return (b"\n".join(data), name) if data else None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
