"""A client that goes away takes its requests with it: streams, waiting answers, and all choices of both."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

BODY = {"model": "tiny", "max_tokens": 400, "ignore_eos": True, "n": 3}
USER = [{"role": "user", "content": "hi"}]


def open_choices(server: Any) -> int:
    """How many choices the engine still works for."""
    count: int = server.model("tiny").engine._queue.num_open
    return count


def send(server: Any, path: str, body: dict[str, Any]) -> socket.socket:
    """A request on a bare socket, which can be dropped at any moment."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": ["one", "two"]}),
    ],
    ids=["chat", "completion", "two-prompts"],
)
def test_its_requests_end_with_it(
    server: Any, wait_until: Any, stream: bool, path: str, prompt: dict[str, Any]
) -> None:
    connection = send(server, path, BODY | prompt | {"stream": stream})
    wait_until(lambda: open_choices(server) >= 3)
    if stream:
        assert b"200 OK" in connection.recv(4096)
    assert open_choices(server) >= 3  # the control: nothing ends by itself so soon
    connection.close()
    wait_until(lambda: open_choices(server) == 0)
    server.model("tiny").engine.scheduler.check_integrity()


def test_the_server_goes_on(server: Any) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "hi", "max_tokens": 1}
    )
    assert answer.status_code == 200
