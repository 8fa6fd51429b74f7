"""`myserve bench` against real servers on sockets: ours, and one that knows only what OpenAI's does."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from typer.testing import CliRunner, Result

from myserve.bench.figures import RequestTimes
from myserve.bench.load import Arrival, ServerFeatures, Target
from myserve.cli import app as command
from myserve.server.app import create_app
from myserve.server.settings import Settings


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The URL of `app`, served until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def bench(url: str, *arguments: object) -> Result:
    return CliRunner().invoke(command, ["bench", "--url", url, *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def ours(tiny_model: Callable[[str], Path]) -> Iterator[str]:
    with listening(create_app(Settings(models={"tiny": str(tiny_model("qwen3"))}))) as url:
        yield url


def test_a_run_against_our_server(ours: str, tmp_path: Path) -> None:
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.svg"
    workloads = ("3x20:6", "2x20:6@logprobs", "1x30:5@t1,n=4", "1x40:1")
    asked = [argument for workload in workloads for argument in ("--workload", workload)]
    result = bench(ours, *asked, "--repeat", 2, "--json", figures, "--chart", chart)
    assert result.exit_code == 0, result.output
    assert all(workload in result.output for workload in workloads)

    record = json.loads(figures.read_text())
    assert record["model"] == "tiny"
    assert list(record["workloads"]) == list(workloads)
    for measured in record["workloads"].values():
        assert measured["prompt_ids"], "our server takes token ids"
        assert measured["extras"]["ignore_eos"] is True
        assert len(measured["runs"]) == 2
    sampled = record["workloads"]["1x30:5@t1,n=4"]["runs"][0]
    # All tokens of all four choices, over the whole run: what the server did is what was counted.
    assert sampled["tokens_per_s"] * sampled["wall_s"] == pytest.approx(4 * 5, rel=0.05)
    assert sampled["ttft_p50"] <= 1e3 * sampled["wall_s"] + 0.01  # both are rounded
    prefill = record["workloads"]["1x40:1"]["runs"][0]
    assert prefill["inter_token_p50"] is None, "one token has none after it"
    assert prefill["prefill_tokens_per_s"] * prefill["wall_s"] == pytest.approx(40, rel=0.05)
    assert ElementTree.parse(chart).getroot().tag.endswith("svg")


def test_requests_come_at_moments_of_their_own(ours: str) -> None:
    """Each is sent at its time, whether the ones before it have ended or not, and has its own lengths."""
    features = ServerFeatures(True, {"ignore_eos": True, "stream_options": {"include_usage": True}})
    arrivals = [Arrival(0.0, list(range(20, 40)), 40), Arrival(0.3, list(range(50, 60)), 3)]

    async def play() -> list[RequestTimes]:
        target = Target(ours, "tiny")
        try:
            return await target.play(arrivals, features)
        finally:
            await target.aclose()

    first, second = asyncio.run(play())
    assert [(t.prompt_tokens, t.tokens) for t in (first, second)] == [(20, 40), (10, 3)]
    assert second.started - first.started >= 0.29


def plain_server(asked: list[dict[str, object]], events: list[str], knows: Set[str] = frozenset()) -> FastAPI:
    """Takes text and OpenAI's fields alone, as many servers do; answers `events` over and over."""
    app = FastAPI()
    known = {"model", "prompt", "max_tokens", "stream", "temperature", "top_p", *knows}

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"data": [{"id": "plain"}]}

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        body = await http.json()
        if unknown := body.keys() - known:
            return JSONResponse({"error": {"message": f"unknown fields: {sorted(unknown)}"}}, 400)
        asked.append(body)

        async def stream() -> AsyncIterator[str]:
            for event in events:
                yield f"data: {event}\n\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


TOKEN = '{"choices": [{"index": 0, "text": "a", "finish_reason": null}]}'
LAST = '{"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}'


def test_a_server_that_knows_openais_fields_alone(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []
    figures = tmp_path / "figures.json"
    with listening(plain_server(asked, [TOKEN, TOKEN, TOKEN, LAST])) as url:  # some never send [DONE]
        result = bench(url, "--workload", "2x8:3@top_p", "--repeat", 1, "--json", figures)
    assert result.exit_code == 0, result.output
    assert {body["top_p"] for body in asked} == {0.95}, "what it does know is still asked for"
    assert all(isinstance(body["prompt"], str) for body in asked)
    median = json.loads(figures.read_text())["workloads"]["2x8:3@top_p"]["median"]
    assert median["tokens_per_s"] * median["wall_s"] == pytest.approx(2 * 3, rel=0.05)


ALL_SPECIAL = '{"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 1}}'


def test_tokens_without_text_are_tokens(tmp_path: Path) -> None:
    """A completion may be one EOS, or half a character: `usage` says that there was a token."""
    asked: list[dict[str, object]] = []
    figures = tmp_path / "figures.json"
    with listening(plain_server(asked, [LAST, ALL_SPECIAL], {"stream_options", "seed"})) as url:
        result = bench(url, "--workload", "2x8:1", "--repeat", 1, "--json", figures, "--seed", 7)
    assert result.exit_code == 0, result.output
    median = json.loads(figures.read_text())["workloads"]["2x8:1"]["median"]
    assert median["tokens_per_s"] * median["wall_s"] == pytest.approx(2, rel=0.05)
    assert [body["seed"] for body in asked if "seed" in body][-2:] == [7, 8], "a run can be repeated"


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([TOKEN, TOKEN], "ended before it was done"),
        ([TOKEN, '{"error": {"message": "out of memory"}}', "[DONE]"], "out of memory"),
        ([LAST, "[DONE]"], "brought no tokens"),
    ],
)
def test_a_stream_that_broke_is_no_measurement(events: list[str], message: str) -> None:
    with listening(plain_server([], events)) as url:
        result = bench(url, "--workload", "1x8:3", "--repeat", 1)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_what_cannot_be_measured_is_said_in_a_line(ours: str) -> None:
    refused = bench(ours, "--workload", "1x8:4000")
    assert refused.exit_code == 1
    assert "context" in refused.output
    absent = bench("http://127.0.0.1:9", "--model", "m")
    assert absent.exit_code == 1
    assert "no answer from http://127.0.0.1:9" in " ".join(absent.output.split())
    assert "ends with .svg, .png, .pdf" in bench(ours, "--chart", "chart.txt").output
