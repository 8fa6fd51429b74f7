"""Who takes too long, and who is in the way when the server ends: told so, and nobody else notices."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from myserve.engine.config import EngineConfig
from myserve.errors import RequestError
from myserve.server.routes import body
from myserve.server.settings import Settings
from myserve.wire.sse import ServerSentEvent, SSEDecoder

Open = Callable[[Settings], AbstractContextManager[Any]]
LONG = {"model": "tiny", "prompt": [5, 6], "max_tokens": 500, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 1}


@pytest.fixture
def settings(tiny_model: Callable[[str], Path]) -> Callable[..., Settings]:
    models = {"tiny": str(tiny_model("qwen3"))}
    return lambda **changes: Settings(**{"models": models} | changes)


def slow_down(server: Any, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Steps so long that 500 tokens outlast any deadline of these tests."""
    runner = server.model("tiny").engine.runner
    run = runner.run

    def slowly(batch: Any) -> Any:
        time.sleep(seconds)
        return run(batch)

    monkeypatch.setattr(runner, "run", slowly)


def events_of(url: str, **fields: Any) -> Iterator[ServerSentEvent]:
    decoder = SSEDecoder()
    with httpx.stream("POST", url + "/v1/completions", json=LONG | fields | {"stream": True}) as answer:
        for part in answer.iter_bytes():
            yield from decoder.feed(part)


def test_an_answer_that_takes_too_long_is_cut(
    open_server: Open, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_server(settings(request_timeout=0.5)) as server:
        slow_down(server, monkeypatch)
        answer = httpx.post(server.url + "/v1/completions", json=LONG, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        *chunks, last = events_of(server.url)
        assert last.event == "error" and last.json()["error"]["code"] == "deadline_exceeded"
        assert 0 < len(chunks) < 500
        assert httpx.post(server.url + "/v1/completions", json=SHORT).status_code == 200
        engine = server.model("tiny").engine
        assert not server.model("tiny").in_flight and engine.load.num_running == 0


def test_a_request_may_want_its_answer_sooner(
    open_server: Open, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_server(settings(request_timeout=60)) as server:
        slow_down(server, monkeypatch)
        answer = httpx.post(server.url + "/v1/completions", json=LONG | {"request_timeout": 0.3}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "the request's own limit" in answer.text
        body = {"token_ids": [5], "sampling_params": {"max_tokens": 500, "ignore_eos": True}}
        answer = httpx.post(server.url + "/inference/v1/generate", json=body | {"request_timeout": 0.3})
        assert answer.status_code == 504
        *_, done = events_of(server.url, max_tokens=5, request_timeout=60)
        assert done.is_done
        for wrong in (0, -1, "soon"):
            answer = httpx.post(server.url + "/v1/completions", json=SHORT | {"request_timeout": wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request_timeout")


def test_who_expires_in_the_queue_is_never_begun(
    open_server: Open, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_server(settings(engine=EngineConfig(max_num_seqs=1))) as server:
        slow_down(server, monkeypatch)
        running, engine = events_of(server.url), server.model("tiny").engine
        next(running)
        late = httpx.post(server.url + "/v1/completions", json=SHORT | {"request_timeout": 0.3}, timeout=60)
        assert late.status_code == 504
        running.close()
        in_time = SHORT | {"request_timeout": 60}
        assert httpx.post(server.url + "/v1/completions", json=in_time, timeout=60).status_code == 200
        assert engine.meters.prompt_tokens == 2 * len(LONG["prompt"])  # of the first and the last


def test_the_time_that_a_body_takes_counts(open_server: Open, settings: Callable[..., Settings]) -> None:
    with open_server(settings()) as server:
        body = json.dumps(SHORT | {"request_timeout": 0.3}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as slow:
            slow.sendall(head + body[:20])
            time.sleep(0.5)
            slow.sendall(body[20:])
            assert slow.recv(100).startswith(b"HTTP/1.1 504")


def test_without_a_deadline_nothing_is_cut(server: Any) -> None:
    *_, end, done = events_of(server.url)
    assert done.is_done and end.json()["choices"][0]["finish_reason"] == "length"


def test_a_body_that_does_not_come_is_a_408_and_a_silent_connection_is_closed(
    open_server: Open, settings: Callable[..., Settings]
) -> None:
    with open_server(settings(client_timeout=0.5)) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
        silent, half_a_head, no_body = (socket.create_connection(address, timeout=20) for _ in range(3))
        half_a_head.sendall(head)
        no_body.sendall(head + b'\r\n{"mod')
        assert httpx.post(server.url + "/v1/completions", json=SHORT).status_code == 200
        assert silent.recv(100) == half_a_head.recv(100) == b""
        with no_body.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 408")
            assert b"request_timeout" in answer.read()  # to the end: it is closed then
        for each in (silent, half_a_head, no_body):
            each.close()


def test_an_answer_may_take_longer_than_a_client(
    open_server: Open, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_server(settings(client_timeout=0.2)) as server:
        slow_down(server, monkeypatch)
        *_, done = events_of(server.url, max_tokens=50)  # a second: five looks at it
        assert done.is_done


def test_at_the_end_who_can_finish_does_and_who_cannot_is_told(
    open_server: Open, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_server(settings(shutdown_timeout=2.0)) as server:
        slow_down(server, monkeypatch)
        short, long = events_of(server.url, max_tokens=20), events_of(server.url)
        next(short), next(long)
        server.server.should_exit = True
        *_, done = short
        assert done.is_done
        *_, last = long
        assert last.event == "error" and "shutting down" in last.json()["error"]["message"]
        with pytest.raises(httpx.ConnectError):
            httpx.post(server.url + "/v1/completions", json=SHORT)


def test_no_new_work_once_the_door_is_closed(open_server: Open, settings: Callable[..., Settings]) -> None:
    with open_server(settings()) as server:
        server.app.state.models.close_door()
        answer = httpx.post(server.url + "/v1/completions", json=SHORT)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("leaves", [False, True])
def test_a_crash_of_the_engine_answers_everyone(
    open_server: Open, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    with open_server(settings(exit_on_engine_death=leaves)) as server:
        slow_down(server, monkeypatch)
        streams = [events_of(server.url) for _ in range(3)]
        for stream in streams:
            next(stream)

        def crash(batch: Any) -> None:
            raise ZeroDivisionError("a bug of ours")

        monkeypatch.setattr(server.model("tiny").engine.runner, "run", crash)
        for stream in streams:
            *_, last = stream
            assert last.event == "error" and "ZeroDivisionError" in last.json()["error"]["message"]
        if not leaves:
            health = httpx.get(server.url + "/health")
            assert (health.status_code, health.json()["status"]) == (503, "dead")
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
            with pytest.raises(openai.InternalServerError, match="stopped"):
                client.completions.create(model="tiny", prompt="hi")
    assert server.server.engine_died is leaves


@pytest.mark.parametrize("name", ["request_timeout", "client_timeout", "shutdown_timeout", "max_body_bytes"])
def test_a_limit_of_nothing_is_an_error(settings: Callable[..., Settings], name: str) -> None:
    with pytest.raises(RequestError, match=name):
        settings(**{name: 0})


def test_a_body_that_says_it_is_too_large_is_not_read(
    open_server: Open, settings: Callable[..., Settings]
) -> None:
    with open_server(settings(max_body_bytes=1000)) as server:
        for head in (
            b"content-length: 1001\r\n\r\n",
            b"transfer-encoding: chunked\r\n\r\n3e9\r\n" + b" " * 1001,
        ):
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 20) as large:
                large.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + head)
                # before a byte of the one, or the end of the other
                assert large.recv(100).startswith(b"HTTP/1.1 413")


def test_large_bodies_take_no_more_memory_than_there_is(
    open_server: Open, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {
        "content": b'{"model": "tiny", "prompt": ['
        + b"7," * 400_000
        + b'7], "user": "'
        + b"x" * (1 << 20)
        + b'"}'
    }
    with open_server(settings()) as server:
        url = server.url + "/v1/completions"
        assert httpx.post(url, **large, timeout=60).json()["error"]["code"] == "context_length_exceeded"
        monkeypatch.setattr(body, "free_host_memory", lambda: 40 << 20)
        answer = httpx.post(url, **large, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert "memory" in answer.text
        assert httpx.post(url, json=SHORT).status_code == 200  # a small one is not asked
