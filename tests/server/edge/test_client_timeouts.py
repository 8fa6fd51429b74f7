"""A client that does not take its answer: cut off, its work ended, its memory bounded, and nobody else notices."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.server.answers import streaming
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder

Open = Callable[[Settings], AbstractContextManager[Any]]
WaitUntil = Callable[[Callable[[], bool]], None]
SHORT = {"model": "tiny", "prompt": [5, 6], "max_tokens": 1}
# Some 20 MB: more than the sockets' buffers on both sides take in.
LARGE = SHORT | {"max_tokens": 480, "ignore_eos": True, "n": 16, "logprobs": True, "top_logprobs": 20}


@pytest.fixture
def settings(tiny_model: Callable[[str], Path]) -> Callable[..., Settings]:
    models = {"tiny": str(tiny_model("qwen3"))}
    return lambda **changes: Settings(models=models, **changes)


def ask(url: str, buffer: int = 4096, **fields: Any) -> socket.socket:
    """Send the large request and read nothing of the answer."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    slow.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    body = json.dumps(LARGE | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body)
    return slow


def answered(url: str) -> bool:
    return httpx.post(url + "/v1/completions", json=SHORT, timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_takes_a_byte_now_and_then_is_cut(
    open_server: Open, settings: Callable[..., Settings], wait_until: WaitUntil, stream: bool
) -> None:
    with open_server(settings(client_timeout=1)) as server, ask(server.url, stream=stream) as slow:

        def is_cut() -> bool:
            assert answered(server.url)
            try:
                return slow.recv(1) == b""
            except ConnectionResetError:
                return True

        def idle() -> bool:
            return not server.model("tiny").in_flight and not server.server.server_state.connections

        wait_until(lambda: is_cut() or idle())
        wait_until(idle)


def test_who_reads_slowly_but_steadily_gets_all(open_server: Open, settings: Callable[..., Settings]) -> None:
    """The control, with the limit that the others are cut by."""
    with (
        open_server(settings(client_timeout=1)) as server,
        ask(server.url, buffer=1 << 18, stream=True, n=4) as slow,
    ):
        got = bytearray()
        while not got.endswith(b"0\r\n\r\n"):
            part = slow.recv(1 << 16)
            assert part, "cut"
            got += part
            time.sleep(0.01)
        assert b"data: [DONE]" in got[-40:]


def test_what_waits_for_a_client_is_bounded(
    open_server: Open,
    settings: Callable[..., Settings],
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "MOST_UNSENT", 1 << 20)
    with open_server(settings()) as server:
        with ask(server.url, stream=True) as slow:
            wait_until(lambda: server.model("tiny").engine.load.num_running > 0)
            wait_until(lambda: server.model("tiny").engine.load.num_running == 0)
            assert answered(server.url)
            text = b"".join(_chunked(slow))
        *_, last = SSEDecoder().feed(text)
        assert last.event == "error" and last.json()["error"]["code"] == "reading_too_slowly"
        assert len(text) < 16 << 20, "what the sockets hold, and a little more"


def _chunked(answer: socket.socket) -> Iterator[bytes]:
    with answer.makefile("rb") as lines:
        while lines.readline() != b"\r\n":
            pass
        while (size := int(lines.readline(), 16)) > 0:
            yield lines.read(size)
            lines.readline()
