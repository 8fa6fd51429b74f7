"""The echo backend: only when asked for, and then the same shapes as a model's."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from myserve.server.app import create_app
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder


def post(env: dict[str, str], path: str, **body: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(Settings.from_env(env)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={"model": "any"} | body)

    return asyncio.run(ask())


def echo(path: str, **body: Any) -> httpx.Response:
    return post({"MYSERVE_FORCE_ECHO": "1", "MYSERVE_MODEL": "any=no/such/folder"}, path, **body)


CHAT = {"messages": [{"role": "system", "content": "Say"}, {"role": "user", "content": "Zß🦄你"}]}


def test_it_says_the_prompt_back() -> None:
    body = echo("/v1/chat/completions", **CHAT).json()
    assert body["choices"][0]["message"]["content"] == "Say\nZß🦄你"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 16


def test_streamed_it_says_the_same() -> None:
    events = SSEDecoder().feed(echo("/v1/chat/completions", stream=True, n=2, **CHAT).content)
    assert events.pop().is_done
    choices = [event.json()["choices"][0] for event in events]
    for index in (0, 1):
        own = [choice["delta"].get("content", "") for choice in choices if choice["index"] == index]
        assert "".join(own) == "Say\nZß🦄你"


def test_max_tokens_are_characters() -> None:
    choice = echo("/v1/completions", prompt="hello", max_tokens=2).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("he", "length")


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"kept": True},
        {"logprob_token_ids": [1]},
        {"prompt": [0x110000]},
        {"prompt": [0xD800]},
    ],
)
def test_what_needs_a_model_is_refused(fields: dict[str, Any]) -> None:
    assert echo("/v1/completions", **{"prompt": "hi"} | fields).status_code == 400


def test_without_being_asked_for_nothing_echoes() -> None:
    """The control: the same server without the variable says that its model does not load."""
    answer = post({"MYSERVE_MODEL": "any=no/such/folder"}, "/v1/completions", prompt="hello")
    assert answer.status_code == 503
    assert "hello" not in answer.text
