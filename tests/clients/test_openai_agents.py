"""openai-agents over the Responses API, which is its default: tools, handoffs, streams, sessions, typed output."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

agents = pytest.importorskip("agents", reason="openai-agents is not installed")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")


class Point(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    x: int
    y: int | None


def run(served: Any, work: Any) -> Any:
    async def main() -> Any:
        agents.set_tracing_disabled(True)
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="any", max_retries=0) as client:
            return await work(agents.OpenAIResponsesModel(model=served.model, openai_client=client))

    return asyncio.run(main())


def settings(**fields: Any) -> Any:
    # it raises for an answer that ends at its limit, so EOS is made likely
    return agents.ModelSettings(max_tokens=400, extra_body={"seed": 1, "logit_bias": {"2": 6}}, **fields)


def test_a_tool_is_run_and_its_output_read(served: Any) -> None:
    ran: list[int] = []

    @agents.function_tool
    def draw(x: int) -> str:
        """Draw a point."""
        ran.append(x)
        return f"drawn at {x}"

    async def work(model: Any) -> Any:
        agent = agents.Agent(
            name="painter", instructions="Draw.", model=model, tools=[draw],
            model_settings=settings(tool_choice="required", parallel_tool_calls=False),
        )  # fmt: skip
        return await agents.Runner.run(agent, "Draw one")

    result = run(served, work)
    kinds = [item.type for item in result.new_items]
    assert kinds[:2] == ["tool_call_item", "tool_call_output_item"] and len(ran) >= 1
    assert result.final_output is not None


def test_a_handoff_is_taken(served: Any) -> None:
    async def work(model: Any) -> Any:
        last = agents.Agent(name="last", instructions="Answer.", model=model, model_settings=settings())
        first = agents.Agent(
            name="first", instructions="Hand over.", model=model, handoffs=[last],
            model_settings=settings(tool_choice="required", parallel_tool_calls=False),
        )  # fmt: skip
        return await agents.Runner.run(first, "Say a color")

    result = run(served, work)
    assert result.last_agent.name == "last" and result.final_output


def test_a_stream_ends_as_the_run_and_output_is_typed(served: Any) -> None:
    async def work(model: Any) -> Any:
        agent = agents.Agent(
            name="typed", instructions="A point.", model=model, output_type=Point, model_settings=settings()
        )
        whole = await agents.Runner.run(agent, "A point")
        streamed = agents.Runner.run_streamed(agent, "A point")
        data = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
        texts = [event.delta for event in data if event.type == "response.output_text.delta"]
        return whole.final_output, streamed.final_output, Point(**json.loads("".join(texts)))

    whole, streamed, joined = run(served, work)
    assert isinstance(whole, Point) and whole == streamed == joined


def test_turns_go_on_by_the_previous_response(served: Any) -> None:
    async def work(model: Any) -> Any:
        agent = agents.Agent(name="a", instructions="Answer.", model=model, model_settings=settings())
        first = await agents.Runner.run(agent, "One")
        second = await agents.Runner.run(agent, "Two", previous_response_id=first.last_response_id)
        return [result.raw_responses[0].usage.input_tokens for result in (first, second)]

    first, second = run(served, work)
    assert second > first
