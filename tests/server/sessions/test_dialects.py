"""The Responses API is read as a chat, so its conversations have sessions too, with ids or without."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from server.sessions.test_agent import SCHEMA

LOOK: Any = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": False}


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_of_items_is_one_trajectory(
    sessions_server: Any, session_client: openai.OpenAI, stream: bool, request: pytest.FixtureRequest
) -> None:
    items: list[Any] = [{"role": "user", "content": "What is there?"}]
    told = []
    for turn in range(5):
        calls = turn % 2 == 0
        asked: Any = {
            "model": "agent",
            "input": items,
            "tools": [LOOK],
            "tool_choice": "required" if calls else "none",
            "max_output_tokens": 90 if calls else 8,
            "store": False,
            "extra_body": {"seed": turn},
        }
        if stream:
            with session_client.responses.create(**asked, stream=True) as events:
                *_, last = events
            response: Any = last.response
        else:
            response = session_client.responses.create(**asked)
        told.append(response.model_extra["session"])
        items += [item.to_dict() for item in response.output]
        if calls:
            called = [item for item in response.output if item.type == "function_call"]
            items += [
                {"type": "function_call_output", "call_id": item.call_id, "output": f"é{turn}"}
                for item in called
            ]
        else:
            items.append({"role": "user", "content": f"And {turn}?"})
    assert [each["continues"] for each in told] == [None, 0, 1, 2, 3]
    body = httpx.get(f"{sessions_server.url}/v1/sessions/{request.node.name}").json()
    (made,) = body["trajectories"]
    assert len(made["turns"]) == 5 and all(each["drift"] for each in told[1:])


def test_an_earlier_response_in_a_session_is_its_turn(
    sessions_server: Any, session_client: openai.OpenAI
) -> None:
    asked: Any = {"model": "agent", "max_output_tokens": 8, "extra_body": {"seed": 1}}
    first = session_client.responses.create(input="Hi", **asked)
    second = session_client.responses.create(input="On", previous_response_id=first.id, **asked)
    # and goes on as a chat, from text alone
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "On"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "More"},
    ]
    third = session_client.chat.completions.create(model="agent", messages=said, max_tokens=8)  # type: ignore[arg-type]
    assert third.choices[0].model_extra is not None
    assert third.choices[0].model_extra["session"]["continues"] == 1
    name = "test_an_earlier_response_in_a_session_is_its_turn"
    (made,) = httpx.get(f"{sessions_server.url}/v1/sessions/{name}").json()["trajectories"]
    assert len(made["turns"]) == 3
