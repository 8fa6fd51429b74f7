"""What we use of uvicorn that is not its public API: this fails before a new version of it is allowed."""

from __future__ import annotations

import inspect
import json
import re
import socket
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from myserve.server.edge.client_timeouts import ImpatientProtocol, timeout_protocol
from myserve.server.edge.graceful import GracefulServer

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())


def test_the_methods_that_we_override_are_there_and_take_what_ours_take() -> None:
    ours = [name for name in vars(ImpatientProtocol) if not name.startswith("_") and name != "timeout"]
    assert sorted(ours) == [
        "connection_lost", "connection_made", "pause_writing", "resume_writing", "send_400_response",
    ]  # fmt: skip
    for name in ours:
        theirs = inspect.signature(getattr(H11Protocol, name)).parameters
        assert list(inspect.signature(getattr(ImpatientProtocol, name)).parameters) == list(theirs), name


def test_the_attributes_that_we_read_are_there() -> None:
    source = inspect.getsource(H11Protocol)
    for name in ("transport", "cycle", "conn", "loop"):
        assert f"self.{name}" in source
    assert "response_complete" in inspect.getsource(inspect.getmodule(H11Protocol).RequestResponseCycle)  # type: ignore[union-attr]
    assert not set(vars(H11Protocol)) & {"timeout", "_idle_timer", "_stall_timer"}


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
    assert "timeout" not in vars(ImpatientProtocol)


@pytest.mark.parametrize(
    "sent",
    [b"BREW\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x00\r\n\r\n",
     b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
     b"GET / HTTP/1.1\r\nhost: x\r\n bad\r\n\r\n", b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 100_000 + b"\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_answered_in_json(server: Any, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as raw:
        raw.sendall(sent)
        answer = b""
        while part := raw.recv(1 << 16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4") and b"application/json" in head.lower()
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_body_that_breaks_http_after_its_head_was_answered_ends_the_connection(server: Any) -> None:
    head = b"POST /v1/nowhere HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as raw:
        raw.sendall(head)
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 404")
        raw.sendall(b"not a chunk\r\n")
        while raw.recv(1 << 16):
            pass
