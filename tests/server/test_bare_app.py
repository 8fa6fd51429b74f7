"""`myserve.main:app` as the original specification drives it: no lifespan, a new event loop for every test."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import httpx
import pytest

from myserve.server.app import create_app
from myserve.server.settings import Settings

# The test of the original specification (docs/specification.md).
SPECIFIED_TEST = """
from httpx import AsyncClient, ASGITransport
import pytest
from myserve.main import app

@pytest.mark.asyncio
async def test_logprobs_shape():
    body = {
        "model": "sshleifer/tiny-gpt2",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 42,
        "stream": False,
    }
    transport = ASGITransport(app=app)
    async with AsyncClient(transport=transport, base_url="http://test") as ac:
        r = await ac.post("/v1/chat/completions", json=body)
    assert r.status_code == 200
    data = r.json()
    assert "logprobs" in data and "content" in data["logprobs"]
    assert len(data["logprobs"]["content"]) > 0
    first = data["logprobs"]["content"][0]
    assert "token" in first and "logprob" in first
    assert isinstance(first.get("top_logprobs", []), list)
"""


@pytest.mark.usefixtures("offline")
def test_the_specifications_own_test_passes() -> None:
    """Offline, with the model in the hub's cache."""
    namespace: dict[str, Any] = {}
    exec(SPECIFIED_TEST, namespace)
    asyncio.run(namespace["test_logprobs_shape"]())
    namespace["app"].state.models.close()


def post(app: Any, **fields: Any) -> httpx.Response:
    """One request on an event loop of its own."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            user = [{"role": "user", "content": "hi"}]
            body = {"model": "sshleifer/tiny-gpt2", "messages": user, "max_tokens": 3, "seed": 1} | fields
            return await client.post("/v1/chat/completions", json=body, timeout=60)

    return asyncio.run(ask())


@pytest.mark.usefixtures("offline")
def test_several_loops_one_engine() -> None:
    app = create_app(Settings.from_env({}))
    try:
        answers = [post(app).json()["choices"][0] for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]
        streamed = post(app, stream=True)
        assert streamed.text.endswith("data: [DONE]\n\n")
    finally:
        app.state.models.close()


@pytest.mark.usefixtures("offline")
def test_a_model_without_a_template_gets_the_plain_one() -> None:
    app = create_app(Settings.from_env({}))
    try:
        turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
        post(app, messages=turns)
        codec = app.state.models.if_loaded("sshleifer/tiny-gpt2").codec
        ids = post(app, messages=turns, return_token_ids=True).json()["prompt_token_ids"]
        assert codec.decode(ids) == "system: Be kind.\nuser: hi\nassistant:"
    finally:
        app.state.models.close()


@pytest.mark.usefixtures("offline")
def test_what_the_operator_did_not_name_is_not_loaded() -> None:
    """With the model in the cache: being loadable is not being served."""
    app = create_app(Settings.from_env({"MYSERVE_ALLOW_MODELS": "some/other"}))
    assert post(app).status_code == 404
    missing = post(app, model="some/other")
    assert missing.status_code == 503
    assert "did not load" in missing.json()["error"]["message"]
    app.state.models.close()


def test_importing_the_app_loads_neither_torch_nor_a_model() -> None:
    code = "import sys, threading, myserve.main; print('torch' in sys.modules, threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]
