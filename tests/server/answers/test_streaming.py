"""What an event stream and a waiting answer do when the client leaves, or the generation fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from fastapi import Request
from starlette.types import Message

from myserve.errors import NonFiniteLogitsError
from myserve.server.answers import streaming
from myserve.server.answers.streaming import ClientGoneError, EventStream, unless_gone
from myserve.wire.sse import DONE, KEEP_ALIVE, SSEDecoder, encode_event


class Client:
    """An ASGI client that leaves after so many messages; None: never."""

    def __init__(self, leaves_after: int | None = None) -> None:
        self.received: list[Message] = []
        self._leaves_after = leaves_after
        self._gone = asyncio.Event()
        if leaves_after == 0:
            self._gone.set()

    async def send(self, message: Message) -> None:
        self.received.append(message)
        if len(self.received) == self._leaves_after:
            self._gone.set()
            await asyncio.Event().wait()  # a socket whose buffer nobody empties

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    @property
    def events(self) -> list[tuple[str, str]]:
        decoder = SSEDecoder()
        body = b"".join(message.get("body", b"") for message in self.received)
        return [(event.event, event.data) for event in decoder.feed(body)]


def event(i: int) -> bytes:
    return encode_event(f'{{"i":{i}}}')


class Chunks:
    """Counts up; remembers whether it was closed and whether it was aborted."""

    def __init__(self, fails_at: int | None = None, hangs_at: int | None = None) -> None:
        self.closed = self.aborted = False
        self._fails_at, self._hangs_at = fails_at, hangs_at

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for i in range(3):
                if i == self._fails_at:
                    raise NonFiniteLogitsError("row 0 has NaN logits")
                if i == self._hangs_at:
                    await asyncio.Event().wait()
                yield event(i)
            yield DONE
        finally:
            self.closed = True

    def abort(self) -> None:
        self.aborted = True


async def serve(chunks: Chunks, client: Client) -> None:
    async with asyncio.timeout(5):
        await EventStream(chunks(), chunks.abort)({"type": "http"}, client.receive, client.send)


@pytest.mark.asyncio
async def test_a_whole_stream_ends_with_done() -> None:
    client = Client()
    await serve(Chunks(), client)
    assert client.events == [
        ("message", '{"i":0}'),
        ("message", '{"i":1}'),
        ("message", '{"i":2}'),
        ("message", "[DONE]"),
    ]
    assert client.received[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.asyncio
async def test_what_is_ready_together_is_written_together() -> None:
    async def two_steps() -> AsyncGenerator[bytes, None]:
        for i in range(6):
            if i == 3:
                await asyncio.sleep(0.01)
            yield event(i)

    client = Client()
    await EventStream(two_steps(), lambda: None)({"type": "http"}, client.receive, client.send)
    bodies = [message["body"] for message in client.received[1:-1]]
    assert [body.count(b"data: ") for body in bodies] == [3, 3]


@pytest.mark.asyncio
async def test_a_failure_on_the_way_is_an_error_event_and_no_done(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    await serve(Chunks(fails_at=1), client)
    (_, first), (name, error) = client.events
    assert (first, name) == ('{"i":0}', "error")
    assert "row 0 has NaN logits" in error
    assert "a stream failed" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("leaves_after", [0, 1, 2])
async def test_a_client_that_leaves_closes_the_source(leaves_after: int) -> None:
    """Before the first byte, after the headers, in the middle of a chunk that cannot be sent."""
    chunks = Chunks()
    await serve(chunks, Client(leaves_after))
    assert chunks.aborted
    assert chunks.closed or leaves_after < 2  # what was never begun has nothing to close


@pytest.mark.asyncio
async def test_a_client_that_leaves_while_nothing_comes() -> None:
    chunks = Chunks(hangs_at=0)
    client = Client()
    serving = asyncio.create_task(serve(chunks, client))
    await asyncio.sleep(0.01)
    assert not chunks.closed
    client._gone.set()
    await serving
    assert chunks.closed
    assert chunks.aborted


def request_of(client: Client) -> Request:
    return Request({"type": "http"}, client.receive)


@pytest.mark.asyncio
async def test_work_is_cancelled_when_nobody_waits_for_it() -> None:
    was_cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    client = Client()
    waiting = asyncio.create_task(unless_gone(request_of(client), work()))
    await asyncio.sleep(0.01)
    client._gone.set()
    with pytest.raises(ClientGoneError):
        await waiting
    assert was_cancelled.is_set()


@pytest.mark.asyncio
async def test_work_that_ends_first_gives_its_result_or_its_error() -> None:
    async def result() -> int:
        return 7

    async def failure() -> int:
        raise NonFiniteLogitsError("NaN")

    assert await unless_gone(request_of(Client()), result()) == 7
    with pytest.raises(NonFiniteLogitsError):
        await unless_gone(request_of(Client()), failure())


@pytest.mark.asyncio
async def test_a_stream_that_waits_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.01)
    waited = asyncio.Event()

    async def late() -> AsyncGenerator[bytes, None]:
        await waited.wait()
        yield event(0)
        yield DONE

    client = Client()
    sending = asyncio.ensure_future(
        EventStream(late(), lambda: None)({"type": "http"}, client.receive, client.send)
    )
    async with asyncio.timeout(10):
        while sum(message.get("body") == KEEP_ALIVE for message in client.received) < 3:
            await asyncio.sleep(0.005)
        waited.set()
        await sending
    assert client.events == [("message", '{"i":0}'), ("message", "[DONE]")]  # a comment is no event
