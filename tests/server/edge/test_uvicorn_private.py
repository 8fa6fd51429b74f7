"""What we use of uvicorn that is not its public API: this fails before a new version of it is allowed."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import socket
import tomllib
from http.client import HTTPResponse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from myserve.server.answers.streaming import CONNECTION
from myserve.server.edge.client_timeouts import ClientTimeoutProtocol, timeout_protocol
from myserve.server.edge.graceful import GracefulServer

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())


def test_the_methods_that_we_override_are_there_and_take_what_ours_take() -> None:
    own = {"timeout", "write_body"}
    ours = [name for name in vars(ClientTimeoutProtocol) if not name.startswith("_") and name not in own]
    assert sorted(ours) == [
        "connection_lost", "connection_made", "pause_writing", "resume_writing", "send_400_response",
    ]  # fmt: skip
    for name in ours:
        theirs = inspect.signature(getattr(H11Protocol, name)).parameters
        assert list(inspect.signature(getattr(ClientTimeoutProtocol, name)).parameters) == list(theirs), name


def test_the_attributes_that_we_read_are_there() -> None:
    source = inspect.getsource(H11Protocol)
    for name in ("transport", "cycle", "conn", "loop", "flow", "write_paused", "scope", "app_state.copy()"):
        assert f"self.{name}" in source or f"{name} =" in inspect.getsource(FlowControl)
    assert "response_complete" in inspect.getsource(inspect.getmodule(H11Protocol).RequestResponseCycle)  # type: ignore[union-attr]
    assert "self.disconnected" in inspect.getsource(inspect.getmodule(H11Protocol).RequestResponseCycle)  # type: ignore[union-attr]
    assert not set(vars(H11Protocol)) & {"timeout", "_idle_timer", "_stall_timer", "write_body"}


def test_the_server_has_the_hooks_that_we_override() -> None:
    for name in ("on_tick", "shutdown"):
        theirs = inspect.signature(getattr(uvicorn.Server, name)).parameters
        assert list(inspect.signature(getattr(GracefulServer, name)).parameters) == list(theirs), name


def test_the_installed_version_is_below_the_bound() -> None:
    (uvicorn_needs,) = [
        d for d in PYPROJECT["project"]["optional-dependencies"]["server"] if d.startswith("uvicorn")
    ]
    bound = re.search(r"<(\d+)\.(\d+)", uvicorn_needs)
    assert bound, "uvicorn's private API is used: its version needs an upper bound"
    assert tuple(map(int, version("uvicorn").split(".")[:2])) < tuple(map(int, bound.groups()))


def test_each_timeout_is_a_class_of_its_own() -> None:
    assert (timeout_protocol(1).timeout, timeout_protocol(2).timeout) == (1, 2)
    assert "timeout" not in vars(ClientTimeoutProtocol)


HEAD = b" /stream HTTP/1.1\r\nhost: localhost\r\n"


async def bytes_of(request: bytes, *, past_asgi: bool) -> tuple[bytes, list[bool]]:
    """What a client reads of an answer in three parts, and which of them went past ASGI."""
    went_past = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"x/y")]})
        for part in (b"one", b"data: two\n\n", b"3" * 5000):
            went_past.append(past_asgi and scope["state"][CONNECTION].write_body(part))
            if not went_past[-1]:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    config = uvicorn.Config(
        app,
        http=timeout_protocol(30),
        log_config=None,
        lifespan="off",
        date_header=False,
        server_header=False,
    )
    server, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        writer.write(request + b"connection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
    finally:
        server.should_exit = True
        await serving
        listener.close()
    return answer, went_past


@pytest.mark.parametrize(
    ("request_", "goes_past"),
    [(b"GET" + HEAD, True), (b"POST" + HEAD + b"content-length: 0\r\n", True), (b"HEAD" + HEAD, False),
     (b"GET" + HEAD.replace(b"1.1", b"1.0"), False)],
)  # fmt: skip
def test_what_is_written_past_asgi_is_the_same_on_the_socket(request_: bytes, goes_past: bool) -> None:
    """Of a body that is not chunked (HTTP/1.0) or not sent (HEAD), nothing may go past h11."""
    through, _ = asyncio.run(bytes_of(request_, past_asgi=False))
    past, went_past = asyncio.run(bytes_of(request_, past_asgi=True))
    assert past == through and b"200 OK" in past
    assert went_past == [goes_past] * 3


@pytest.mark.parametrize(
    "sent",
    [b"BREW\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x00\r\n\r\n",
     b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
     b"GET / HTTP/1.1\r\nhost: x\r\n bad\r\n\r\n", b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 100_000 + b"\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_answered_in_json(server: Any, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as raw:
        raw.sendall(sent)
        answer = HTTPResponse(raw)
        answer.begin()
        body = json.loads(answer.read())
        # what h11 can read, if only the app refuses it, leaves a connection that is good for more
        assert not answer.will_close or raw.recv(1) == b""
    assert 400 <= answer.status < 500 and answer.getheader("content-type") == "application/json"
    assert body["error"]["type"] == "invalid_request_error"


def test_a_body_that_breaks_http_after_its_head_was_answered_ends_the_connection(server: Any) -> None:
    head = b"POST /v1/nowhere HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as raw:
        raw.sendall(head)
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 404")
        raw.sendall(b"not a chunk\r\n")
        while raw.recv(1 << 16):
            pass
