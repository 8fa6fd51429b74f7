"""A dialect is one file over `answer_request`: here one with named events and an end of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from myserve.core.params import SamplingParams
from myserve.engine.outputs import Delta
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.respond import answer_request
from myserve.server.answers.writer import AnswerWriter, Plan
from myserve.server.app import create_app
from myserve.server.choice import Choice
from myserve.server.routes.body import read_request
from myserve.server.settings import Settings
from myserve.wire.completions import CompletionRequest
from myserve.wire.sse import SSEDecoder


class Spelling(AnswerWriter[CompletionRequest]):
    """Says what came, event by event; the whole answer is the text alone."""

    done = b"event: bye\ndata: {}\n\n"

    def whole(self, choices: Sequence[Choice]) -> Any:
        return {"text": "".join(choices[0].texts)}

    def began(self, choices: Sequence[Choice]) -> Iterator[Any]:
        yield {"prompt": len(choices[0].prompt_token_ids)}

    def gained(self, choice: Choice, delta: Delta) -> Iterator[Any]:
        for letter in delta.text:
            yield {"letter": letter}
        if delta.finish_reason is not None:
            yield {"reason": delta.finish_reason}

    def ended(self, choices: Sequence[Choice]) -> Iterator[Any]:
        yield {"total": len(choices[0].sampled)}

    def encode(self, event: bytes) -> bytes:
        return b"event: spelled\ndata: " + event + b"\n\n"


async def spell(http: Request) -> Response:
    request = await read_request(http, CompletionRequest)

    async def plan(answer: ActiveAnswer[CompletionRequest]) -> Plan:
        ids = answer.model.codec.encode(str(request.prompt))
        return Plan([ids], [SamplingParams(max_tokens=request.max_tokens)], Spelling(answer))

    return await answer_request(http, request, plan, answer_id="one")


@pytest.fixture
def app() -> Iterator[FastAPI]:
    app = create_app(Settings(models={"echo": "anything"}, force_echo=True))
    app.add_api_route("/spell", spell, methods=["POST"])
    yield app
    app.state.models.close()


def post(app: FastAPI, **fields: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/spell", json={"model": "echo", "prompt": "abc"} | fields)

    return asyncio.run(ask())


def test_whole(app: FastAPI) -> None:
    assert post(app).json() == {"text": "abc"}


def test_what_costs_were_asked_for_stands_in_any_dialect(app: FastAPI) -> None:
    answer = post(app, perf_metrics_in_response=True)
    assert answer.json()["perf_metrics"]["prompt-tokens"] == 3
    assert answer.headers["fireworks-prompt-tokens"] == "3"


def test_a_stream_has_the_dialects_own_events_in_order(app: FastAPI) -> None:
    events = SSEDecoder().feed(post(app, stream=True, perf_metrics_in_response=True).content)
    assert [event.event for event in events] == ["spelled"] * (len(events) - 1) + ["bye"]
    told = [event.json() for event in events]
    assert told[0] == {"prompt": 3}
    assert [one["letter"] for one in told if "letter" in one] == list("abc")
    assert told[-3]["reason"] == "stop"
    assert told[-3]["perf_metrics"]["prompt-tokens"] == 3
    assert told[-2:] == [{"total": 3}, {}]


def test_what_a_plan_refuses_is_the_callers_error(app: FastAPI) -> None:
    answer = post(app, stream=True, max_tokens=0)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
