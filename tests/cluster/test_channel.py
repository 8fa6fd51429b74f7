"""Frames: cut anywhere they are whole again, and nothing is read of who does not show the secret."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from myserve.cluster.channel import Channel, Kind, error_from, error_to, pack
from myserve.errors import OverloadedError, RequestError

pytestmark = pytest.mark.asyncio


async def served(expects: str) -> tuple[list[tuple[Kind, bytes]], int, asyncio.Server]:
    seen: list[tuple[Kind, bytes]] = []

    def channel() -> Channel:
        return Channel(lambda _, kind, body: seen.append((kind, body)), lambda _: None, expects=expects)

    server = await asyncio.get_running_loop().create_server(channel, "127.0.0.1", 0)
    return seen, server.sockets[0].getsockname()[1], server


def frame(kind: Kind, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + bytes((kind,)) + body


async def test_frames_cut_anywhere_are_whole_again() -> None:
    seen, port, server = await served("secret")
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    whole = frame(Kind.HELLO, b"secret") + frame(Kind.PING, b"") + frame(Kind.CALL, b"x" * 70_000)
    for at in range(0, len(whole), 9_973):
        writer.write(whole[at : at + 9_973])
        await writer.drain()
        await asyncio.sleep(0.002)
    while len(seen) < 3:
        await asyncio.sleep(0.01)
    assert seen == [(Kind.HELLO, b"secret"), (Kind.PING, b""), (Kind.CALL, b"x" * 70_000)]
    writer.close()
    server.close()


@pytest.mark.parametrize(
    "first",
    [
        frame(Kind.HELLO, b"guess"),
        frame(Kind.CALL, pack((1, "prepare", {}))),
        frame(Kind.HELLO, b"s" * 2000),
    ],
)
async def test_who_does_not_show_the_secret_is_cut_and_unread(first: bytes) -> None:
    seen, port, server = await served("secret")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first + frame(Kind.PING, b""))
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    assert seen == []
    writer.close()
    server.close()


@pytest.mark.parametrize(
    "error", [RequestError("no", param="n", code="c"), OverloadedError("full", retry_after=3.0)]
)
async def test_our_errors_arrive_as_they_are(error: Any) -> None:
    found = error_from(error_to(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
