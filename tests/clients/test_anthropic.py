"""The first pages of anthropic's README and of its helpers: create, stream, tools, thoughts, counts, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")

USER: Any = [{"role": "user", "content": "Say this is a test"}]
TOOL: Any = {
    "name": "draw",
    "description": "Draws.",
    "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
}


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    url = served.base_url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        yield client


def test_create_and_stream_agree(client: Any, served: Any) -> None:
    asked = {"model": served.model, "messages": USER, "max_tokens": 20, "extra_body": {"seed": 1}}
    whole = client.messages.create(**asked, system="Be brief", stop_sequences=["zzz"])
    with client.messages.stream(**asked, system="Be brief", stop_sequences=["zzz"]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert whole._request_id


def test_models_are_listed(client: Any, served: Any) -> None:
    listed = list(client.models.list(limit=1))
    assert listed[0].id == served.model
    assert client.models.retrieve(served.model).max_input_tokens == listed[0].max_input_tokens > 0


def test_a_tool_is_called_and_its_result_read(client: Any, served: Any) -> None:
    asked = {"model": served.model, "max_tokens": 200, "tools": [TOOL], "extra_body": {"seed": 2}}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    first = client.messages.create(**asked, messages=USER, tool_choice=choice)
    (call,) = first.content
    assert (first.stop_reason, call.name, type(call.input["x"])) == ("tool_use", "draw", int)
    with client.messages.stream(**asked, messages=USER, tool_choice=choice) as stream:
        assert stream.get_final_message().content[0].input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    said = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**asked, messages=said, tool_choice={"type": "none"}).content[0].text


def test_the_tool_runner_runs_a_tool(client: Any, served: Any) -> None:
    drawn: list[int] = []

    @anthropic.beta_tool
    def draw(x: int) -> str:
        """Draw a point.

        Args:
            x: Where.
        """
        drawn.append(x)
        return "done"

    runner = client.beta.messages.tool_runner(
        model=served.model, max_tokens=200, tools=[draw], messages=USER, max_iterations=2,
        tool_choice={"type": "any", "disable_parallel_tool_use": True}, extra_body={"seed": 2},
    )  # fmt: skip
    messages = list(runner)
    assert len(messages) == len(drawn) == 2


def test_counts_and_errors(client: Any, served: Any) -> None:
    made = client.messages.create(model=served.model, messages=USER, max_tokens=1).usage
    counted = client.messages.count_tokens(model=served.model, messages=USER)
    assert counted.input_tokens == made.input_tokens + made.cache_read_input_tokens
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="no such model", messages=USER, max_tokens=1)
    assert missing.value.type == "not_found_error" and missing.value.request_id
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(model=served.model, messages=[], max_tokens=1)
    assert refused.value.type == "invalid_request_error"
