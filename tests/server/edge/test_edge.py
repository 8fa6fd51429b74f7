"""What every answer has, from the outermost layer: ids, headers, a log line without a word of the prompt."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from myserve.server.observe.logs import JsonLines, RequestFields, TextLines, begin


@pytest.mark.parametrize("path", ["/health", "/", "/nowhere"])
def test_safe_headers_are_on_every_answer(server: Any, path: str) -> None:
    headers = httpx.get(server.url + path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-request-id"]


def test_a_route_that_has_its_own_header_keeps_it(server: Any) -> None:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 1, "stream": True}
    assert httpx.post(server.url + "/v1/completions", json=body).headers["cache-control"] == "no-cache"


def lines_of(request_id: str, caplog: pytest.LogCaptureFixture) -> list[tuple[logging.LogRecord, Any]]:
    """The server is shared: lines of requests that ended a moment ago may still come in."""
    records = [record for record in list(caplog.records) if RequestFields().filter(record)]
    lines = [(record, json.loads(JsonLines().format(record))) for record in records]
    return [(record, line) for record, line in lines if line.get("request_id") == request_id]


def test_a_request_is_a_line_with_its_id_and_its_cost(
    server: Any, caplog: pytest.LogCaptureFixture, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    caplog.set_level(logging.INFO, "myserve.access")
    body = {"model": "tiny", "prompt": "my secret", "max_tokens": 3, "ignore_eos": True, "n": 2}
    url, headers = server.url + "/v1/completions", {"x-request-id": "abc"}
    for stream in (False, True):
        caplog.clear()
        answer = httpx.post(url, json=body | {"stream": stream}, headers=headers)
        assert answer.headers["x-request-id"] == "abc"
        wait_until(lambda: len(lines_of("abc", caplog)) > 0)  # it is written when the last byte has been
        ((record, line),) = lines_of("abc", caplog)
        expected = {"request_id": "abc", "status": 200, "model": "tiny", "choices": 2, "completion_tokens": 6}
        assert expected.items() <= line.items()
        assert line["message"] == "POST /v1/completions" and line["seconds"] > 0 and "cut" not in line
        assert "request_id=abc" in TextLines().format(record)
        assert "secret" not in str(line)


def test_whatever_is_logged_for_a_request_has_its_id() -> None:
    record = logging.LogRecord("myserve.server", logging.ERROR, "", 0, "a stream failed", (), None)
    begin("r-7")
    RequestFields().filter(record)
    assert json.loads(JsonLines().format(record))["request_id"] == "r-7"


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/ready",
        "/version",
        "/v1/models",
        "/v1/models/tiny",
        "/metrics",
        "/",
        "/openapi.json",
        "/x",
    ],
)
def test_a_head_is_the_get_without_its_body(server: Any, path: str) -> None:
    head, get = httpx.head(server.url + path), httpx.get(server.url + path)
    assert head.status_code == get.status_code and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    if path not in ("/metrics", "/x"):
        assert head.headers["content-length"] == get.headers["content-length"]
    # the connection is good for what comes next
    with httpx.Client(base_url=server.url) as client:
        assert [client.head(path).content, client.get("/health").status_code] == [b"", 200]


def test_a_head_of_what_takes_only_posts_is_refused(server: Any) -> None:
    answer = httpx.head(server.url + "/v1/completions")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "POST", b"")


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/api/chat", "POST /v1/chat/completions"),
        ("/chat/completions", "POST /v1/chat/completions"),
        ("/api/generate", "POST /v1/completions"),
        ("/v1/embeddings", "no embeddings"),
    ],
)
def test_a_404_says_what_is_served_instead(server: Any, path: str, named: str) -> None:
    answer = httpx.post(server.url + path, json={})
    assert answer.status_code == 404
    assert named in answer.json()["error"]["message"]
    plain = httpx.post(server.url + "/v1/nothing", json={}).json()["error"]["message"]
    assert "instead" not in plain


def test_deep_nesting_is_the_clients_fault(server: Any) -> None:
    deep = "[" * 200_000
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": deep}}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "1", "content": "x"})
    bodies = [
        json.dumps({"model": "tiny", "messages": turns, "max_tokens": 1}),
        f'{{"model": "tiny", "messages": [{{"role": "user", "content": "hi"}}], "tools": {deep}',
        f'{{"model": "tiny", "messages": [{{"role": "user", "content": "hi"}}], "x": {deep}{"]" * 200_000}}}',
        '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "response_format": '
        + '{"a":' * 5000,
        json.dumps({"model": "tiny", "messages": turns[:1], "structured_outputs": {"structural_tag": deep}}),
        json.dumps({"model": "tiny", "messages": turns[:1], "json_schema": deep}),
    ]
    for body in bodies:
        answer = httpx.post(server.url + "/v1/chat/completions", content=body)
        assert answer.status_code == 400, (body[:80], answer.text[:200])
        assert answer.json()["error"]["type"] == "invalid_request_error"
