"""langchain-openai's first page: invoke, stream, structured output, tools, batch."""

from __future__ import annotations

from typing import Any

import pytest

langchain = pytest.importorskip(
    "langchain_openai", reason="langchain-openai is not installed: tests/clients/conftest.py says how"
)
pydantic = pytest.importorskip("pydantic")


class Joke(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    """A joke."""

    setup: str
    rating: int


@pytest.fixture
def llm(served: Any) -> Any:
    return langchain.ChatOpenAI(
        model=served.model, base_url=served.base_url, api_key="any", seed=1, max_tokens=120, max_retries=0
    )


MESSAGES = [("system", "You translate English to French."), ("human", "I love programming.")]


def test_invoke_and_stream_agree(llm: Any) -> None:
    assert "".join(chunk.text for chunk in llm.stream(MESSAGES)) == llm.invoke(MESSAGES).text


def test_usage_and_batch(llm: Any) -> None:
    answers = llm.batch([MESSAGES, MESSAGES])
    assert answers[0].content == answers[1].content
    assert answers[0].usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(llm: Any, method: str) -> None:
    assert isinstance(llm.with_structured_output(Joke, method=method).invoke("Tell me a joke"), Joke)


def test_a_tool_is_called(llm: Any) -> None:
    called = llm.bind_tools([Joke], tool_choice="Joke").invoke("Tell me a joke").tool_calls
    assert [call["name"] for call in called] == ["Joke"]
    assert set(called[0]["args"]) == {"setup", "rating"}
