"""The whole application in its bad hours: still loading, overloaded, its engine dead, its requests too large."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from myserve.engine.config import EngineConfig
from myserve.server.app import create_app
from myserve.server.models.models import Models, ServedModel, load_model
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder

BODY = {"model": "tiny", "prompt": "hi", "max_tokens": 400, "ignore_eos": True}


def settings_of(**changes: Any) -> Settings:
    return Settings(**{"models": {"tiny": "no/such/folder"}, "force_echo": True} | changes)


def ask(app: FastAPI, method: str, path: str, **fields: Any) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **fields)

    return asyncio.run(request())


@pytest.fixture
def small(tiny_model: Callable[[str], Path]) -> Iterator[FastAPI]:
    """A real model behind a queue of two."""
    app = create_app(Settings(models={"tiny": str(tiny_model("qwen3"))}, engine=EngineConfig(max_queue=2)))
    yield app
    app.state.models.close()


def test_a_body_over_the_limit_is_a_413() -> None:
    app = create_app(settings_of(max_body_bytes=200))
    assert ask(app, "POST", "/v1/completions", json=BODY | {"prompt": "x" * 100}).status_code == 200
    answer = ask(app, "POST", "/v1/completions", json=BODY | {"prompt": "x" * 200})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_strict_server_refuses_what_no_api_knows() -> None:
    body = BODY | {"temprature": 0}
    assert ask(create_app(settings_of()), "POST", "/v1/completions", json=body).status_code == 200
    answer = ask(create_app(settings_of(strict=True)), "POST", "/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temprature")


def test_while_it_loads_it_is_neither_healthy_nor_ready() -> None:
    app = create_app(settings_of())
    may_load = threading.Event()

    def load(path: str, settings: Settings) -> ServedModel:
        assert may_load.wait(10)
        return load_model(path, settings)

    app.state.models = models = Models(settings_of(), load)
    assert ask(app, "GET", "/health").status_code == 200  # nobody has asked for anything yet
    models.preload()
    busy = ask(app, "GET", "/health")
    assert (busy.status_code, busy.json()) == (503, {"status": "loading", "models": ["tiny"]})
    loading = ask(app, "GET", "/ready")
    assert (loading.status_code, loading.json()["models"]) == (503, {"tiny": "loading"})
    may_load.set()
    assert ask(app, "POST", "/v1/completions", json=BODY).status_code == 200  # it waits for the load
    assert ask(app, "GET", "/ready").json() == {"status": "ready", "models": {"tiny": "ready"}}
    assert ask(app, "GET", "/health").status_code == 200
    models.close()


def test_a_full_queue_is_a_429_with_a_time_to_come_back(small: FastAPI, wait_until: Any) -> None:
    answer = ask(small, "POST", "/v1/completions", json=BODY | {"n": 3})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"
    of_many = ask(small, "POST", "/v1/completions", json=BODY | {"prompt": ["a", "b", "c"]})
    assert of_many.status_code == 429
    # and the prompts that were let in before the third leave with it
    wait_until(
        lambda: ask(small, "POST", "/v1/completions", json=BODY | {"n": 2, "max_tokens": 1}).is_success
    )


def read_as_openai(answer: httpx.Response) -> None:
    """Hand the bytes to openai's client. It raises at the error event; a stream that just ended would look whole."""
    again = httpx.Response(200, headers=answer.headers, content=answer.content)
    http_client: Any = httpx.Client(transport=httpx.MockTransport(lambda request: again))
    with openai.OpenAI(base_url="http://test/v1", api_key="any", http_client=http_client) as client:
        list(client.completions.create(model="tiny", prompt="hi", stream=True))


def test_an_engine_that_dies_is_an_error_for_all_and_seen_from_outside(small: FastAPI) -> None:
    assert ask(small, "POST", "/v1/completions", json=BODY | {"max_tokens": 1}).status_code == 200
    engine: Any = small.state.models.if_loaded("tiny").engine

    def stream_then_kill() -> httpx.Response:
        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(app=small)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                asyncio.get_running_loop().call_later(0.05, engine.shutdown)
                return await client.post("/v1/completions", json=BODY | {"stream": True})

        return asyncio.run(request())

    cut = stream_then_kill()
    *chunks, last = SSEDecoder().feed(cut.content)
    assert last.event == "error"
    assert last.json()["error"]["type"] == "server_error"
    assert all(chunk.event == "message" for chunk in chunks)
    with pytest.raises(openai.APIError, match="shut down"):
        read_as_openai(cut)
    assert ask(small, "POST", "/v1/completions", json=BODY).status_code == 503
    assert ask(small, "GET", "/health").status_code == 503
    assert ask(small, "GET", "/ready").json()["models"] == {"tiny": "dead"}


def test_a_bug_of_ours_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(settings_of())

    class Broken:
        @property
        def names(self) -> None:
            raise ZeroDivisionError("secret")

    app.state.models = Broken()
    answer = ask(app, "GET", "/v1/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "secret" in caplog.text  # but the log has it
