"""litellm's first page: completion, streaming, and its own kinds of errors."""

from __future__ import annotations

from typing import Any

import pytest

litellm = pytest.importorskip(
    "litellm", reason="litellm is not installed: tests/clients/conftest.py says how"
)

USER = [{"role": "user", "content": "Hello, how are you?"}]


@pytest.fixture(params=["openai", "hosted_vllm"])
def asked(served: Any, request: pytest.FixtureRequest) -> dict[str, Any]:
    named = {"model": f"{request.param}/{served.model}", "api_base": served.base_url, "api_key": "any"}
    return named | {"messages": USER, "seed": 1, "max_tokens": 20, "num_retries": 0}


def test_completion_and_stream_agree(asked: dict[str, Any]) -> None:
    whole = litellm.completion(**asked).choices[0].message.content
    streamed = litellm.completion(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole


def test_logprobs_pass_through(asked: dict[str, Any]) -> None:
    answer = litellm.completion(**asked, logprobs=True, top_logprobs=2)
    assert len(answer.choices[0].logprobs["content"]) > 0


def test_a_prompt_that_is_too_long_is_litellms_own_error(asked: dict[str, Any]) -> None:
    """By the phrase that it looks for in the message."""
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked | {"max_tokens": 10**6})


def test_a_wrong_value_is_a_bad_request(asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**asked | {"temperature": -1})
