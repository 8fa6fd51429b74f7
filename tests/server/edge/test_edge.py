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
