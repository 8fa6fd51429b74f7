"""/openapi.json is true: every route is in it, answers and errors fit its schemas, and fuzzing by it finds no 5xx."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fastapi.routing import APIRoute, APIRouter

from myserve.server import routes as routes_package
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder
from runs import thorough

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 1}
COMPLETION = {"model": "tiny", "prompt": "hi", "max_tokens": 3, "seed": 1}
EXTRAS = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "raw_output": True, "n": 2}
RESPONSE = {"model": "tiny", "input": "hi", "max_output_tokens": 4, "seed": 1}
MESSAGE = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 4, "seed": 1}
GENERATE = {"token_ids": [5], "sampling_params": {"max_tokens": 3, "logprobs": 1}}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | EXTRAS | {"kept": True, "perf_metrics_in_response": True}),
    ("/inference/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}, "max_tokens": 20}),
    ("/v1/completions", COMPLETION | EXTRAS | {"echo": True, "prompt_logprobs": 1}),
    ("/inference/v1/completions", COMPLETION | {"logprobs": 2, "token_arrays": False}),
    ("/inference/v1/completions", COMPLETION | {"token_arrays": True}),
    ("/inference/v1/generate", GENERATE),
    ("/v1/messages", MESSAGE),
    ("/v1/messages", MESSAGE | {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}),
    ("/v1/responses", RESPONSE),
    ("/v1/responses", RESPONSE | {"top_logprobs": 1, "logprobs": True, "return_token_ids": True}),
    ("/generate", {"input_ids": [5, 6], "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}),
]  # fmt: skip


@pytest.fixture(scope="module")
def document(server: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(server.url + "/openapi.json").json()
    return answer


def fits(
    document: dict[str, Any], path: str, value: Any, *, status: str = "200", media: str = "application/json"
) -> None:
    """Raises where a value is not what the document says."""
    said = document["paths"][path]["post"]["responses"][status]["content"][media]["schema"]
    jsonschema_rs.validator_for(said | {"components": document["components"]}).validate(value)


def routes_of(module: Any) -> list[APIRoute]:
    return [route for route in getattr(module, "router", APIRouter()).routes if isinstance(route, APIRoute)]


def test_every_route_is_in_it(document: dict[str, Any]) -> None:
    modules = [
        import_module(found.name)
        for found in walk_packages(routes_package.__path__, routes_package.__name__ + ".")
    ]
    routes = {route.path.replace(":path", "") for module in modules for route in routes_of(module)}
    assert set(document["paths"]) == routes - {"/"}  # the inspector is a page
    statuses = {
        status
        for path in document["paths"].values()
        for said in path.values()
        for status in said["responses"]
    }
    assert statuses == {"200", "503", "default"}
    assert ">>>" not in json.dumps(document)


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_answers_and_events_are_as_it_says(
    server: Any, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    fits(document, path, httpx.post(server.url + path, json=body).json())
    streamed = httpx.post(
        server.url + path, json=body | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = SSEDecoder().feed(streamed.content)
    assert len(events) > 2
    for event in events[:-1] if events[-1].is_done else events:
        fits(document, path, event.json(), media="text/event-stream")


def test_decisions_are_as_it_says(server: Any, document: dict[str, Any]) -> None:
    choice = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": True}]}
    score = {"type": "score", "instructions": "How?", "levels": [{"label": "low"}, {"label": "high"}]}
    asked = {
        "model": "tiny",
        "input": "hi",
        "questions": [{"type": "predicate", "instructions": "?"}, choice, score],
    }
    fits(document, "/v1/decisions", httpx.post(server.url + "/v1/decisions", json=asked).json())
    told = {"model": "tiny", "state": [1], "questions": {"a": {"type": "noul"}}, "return_token_ids": True}
    fits(document, "/v1/systemone", httpx.post(server.url + "/v1/systemone", json=told).json())


def test_errors_are_as_it_says_and_a_wrong_value_would_be_seen(server: Any, document: dict[str, Any]) -> None:
    answer = httpx.post(server.url + "/v1/completions", json={"model": "nobody", "prompt": "hi"})
    assert answer.status_code == 404
    fits(document, "/v1/completions", answer.json(), status="default")
    refused = httpx.post(server.url + "/v1/messages", json={"model": "nobody"})
    fits(document, "/v1/messages", refused.json(), status="default")
    with pytest.raises(jsonschema_rs.ValidationError):
        fits(document, "/v1/messages", answer.json(), status="default")
    with pytest.raises(jsonschema_rs.ValidationError):
        fits(document, "/v1/completions", answer.json())
    with pytest.raises(jsonschema_rs.ValidationError):
        fits(document, "/v1/completions", {"error": "no"}, status="default")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("phases", ["fuzzing", thorough("coverage")])
def test_schemathesis_finds_no_5xx(
    phases: str,
    open_server: Callable[[Settings], AbstractContextManager[Any]],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Random bodies, and such as break the schemas one rule at a time; answers must be what the document says."""
    with open_server(Settings(models={"tiny": str(tiny_model("qwen3"))})) as server:
        done = fuzzed(server.url, tmp_path, phases)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "No issues found" in done.stdout, done.stdout[-3000:]


def fuzzed(url: str, folder: Path, phases: str) -> subprocess.CompletedProcess[str]:
    """Run schemathesis against a server; a pause would have all that follows wait for ever."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, *f"-m schemathesis.cli run {url}/openapi.json --mode negative".split()]
    options = ["--checks", checks, "--phases", phases, "--max-examples", "4", "--no-color"]
    limits = ["--generation-deterministic", "--max-failures", "3", "--request-timeout", "60"]
    excluded = ["--exclude-path-regex", "^/(pause|pause_generation)$"]
    return subprocess.run(
        [*command, *options, *limits, *excluded], capture_output=True, text=True, check=False, cwd=folder
    )
