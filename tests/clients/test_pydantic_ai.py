"""pydantic-ai's first page: an agent with text, and one whose output has a type."""

from __future__ import annotations

from typing import Any

import pytest

pydantic_ai = pytest.importorskip(
    "pydantic_ai", reason="pydantic-ai-slim[openai] is not installed: tests/clients/conftest.py says how"
)
pydantic = pytest.importorskip("pydantic")


class City(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    city: str
    country: str


@pytest.fixture
def model(served: Any) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=served.base_url, api_key="any")
    return OpenAIChatModel(served.model, provider=provider)


def test_an_agent_says_something(model: Any) -> None:
    agent = pydantic_ai.Agent(model, instructions="Be concise, reply with one sentence.")
    done = agent.run_sync("Where does 'hello world' come from?", model_settings={"max_tokens": 30, "seed": 3})
    assert isinstance(done.output, str)
    assert done.usage.output_tokens > 0 if not callable(done.usage) else done.usage().output_tokens > 0


@pytest.mark.parametrize("kind", ["ToolOutput", "NativeOutput"])
def test_an_output_has_its_type(model: Any, kind: str) -> None:
    agent = pydantic_ai.Agent(model, output_type=getattr(pydantic_ai, kind)(City))
    done = agent.run_sync("The windy city in the US of A.", model_settings={"max_tokens": 200, "seed": 3})
    assert isinstance(done.output, City)
