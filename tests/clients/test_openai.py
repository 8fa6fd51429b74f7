"""The first pages of openai-python's README: create, stream, helpers, tools, raw responses, async."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="openai is not installed")
pydantic = pytest.importorskip("pydantic")

USER: Any = [{"role": "user", "content": "Say this is a test"}]


class Point(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    x: int
    y: int | None


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.base_url, api_key="any", max_retries=0) as client:
        yield client


def test_create_and_stream_agree(client: Any, served: Any) -> None:
    asked = {"model": served.model, "messages": USER, "max_tokens": 20, "seed": 1}
    whole = client.chat.completions.create(**asked)
    streamed = client.chat.completions.create(**asked, stream=True)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        == whole.choices[0].message.content
    )


def test_the_stream_helper_with_logprobs(client: Any, served: Any) -> None:
    asked = {"model": served.model, "messages": USER, "seed": 1, "n": 2, "logprobs": True}
    # the helper raises by itself for what ends at its limit
    asked |= {"max_tokens": 400, "stop": ["e", "a", "o", "t"]}
    with client.chat.completions.stream(**asked, top_logprobs=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "logprobs.content.delta" in kinds
    whole = client.chat.completions.create(**asked, top_logprobs=2)
    assert [c.message.content for c in final.choices] == [c.message.content for c in whole.choices]
    assert [len(c.logprobs.content) for c in final.choices] == [
        len(c.logprobs.content) for c in whole.choices
    ]


def test_parse_with_a_response_format_and_with_a_tool(client: Any, served: Any) -> None:
    asked = {"model": served.model, "messages": USER, "max_tokens": 120, "seed": 2}
    answer = client.chat.completions.parse(**asked, response_format=Point)
    assert isinstance(answer.choices[0].message.parsed, Point)
    tool = openai.pydantic_function_tool(Point, name="draw")
    choice = {"type": "function", "function": {"name": "draw"}}
    called = client.chat.completions.parse(**asked, tools=[tool], tool_choice=choice)
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Point)


def test_raw_responses_and_errors(client: Any, served: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(model=served.model, messages=USER, max_tokens=2)
    assert raw.headers["x-request-id"] == raw.parse()._request_id
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no such model", messages=USER)


def test_many_at_once(served: Any) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="any", max_retries=0) as client:
            one = client.completions.create
            return await asyncio.gather(
                *(one(model=served.model, prompt="x", max_tokens=3) for _ in range(30))
            )

    assert all(answer.usage.completion_tokens for answer in asyncio.run(ask()))
