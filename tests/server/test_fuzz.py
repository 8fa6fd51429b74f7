"""Anything may be sent: the answer is 2xx or 4xx in OpenAI's shape, never a 500, and the next request is served."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.generate import GenerateRequest
from myserve.wire.messages_api.request import MessagesRequest
from myserve.wire.responses_api.request import ResponseRequest

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["auto", "required", "json_object", "assistant", "user", "text", "function", "(", "[a-"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "schema", "name", "5", ""]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
ROUTES: list[tuple[str, Any, dict[str, Any]]] = [
    ("/v1/chat/completions", ChatCompletionRequest, {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/completions", CompletionRequest, {"prompt": "hi"}),
    ("/inference/v1/generate", GenerateRequest, {"token_ids": [5]}),
    ("/v1/messages", MessagesRequest, {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/responses", ResponseRequest, {"input": "hi", "max_output_tokens": 2}),
    ("/tokenize", CompletionRequest, {"prompt": "hi"}),
    ("/detokenize", GenerateRequest, {"tokens": [5]}),
    ("/v1/weights", CompletionRequest, {"path": "x"}),
]


def is_answer(answer: httpx.Response) -> bool:
    if answer.is_success:
        return True
    return 400 <= answer.status_code < 500 and set(answer.json()["error"]) - {"details"} == {
        "message",
        "type",
        "param",
        "code",
    }


@pytest.mark.parametrize(("path", "kind", "whole"), ROUTES, ids=[path for path, *_ in ROUTES])
def test_no_fields_are_a_500(server: Any, path: str, kind: Any, whole: dict[str, Any]) -> None:
    """A whole request with some fields replaced: most get through parsing, so the rooms behind it are reached."""
    fields = sorted(set(kind.model_fields) - {"model", "n", "best_of"})
    with httpx.Client(base_url=server.url, timeout=60) as client:

        @settings(
            max_examples=60,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.dictionaries(st.sampled_from(fields), JSON, min_size=1, max_size=3))
        def send(changes: dict[str, Any]) -> None:
            limit = {} if "max_output_tokens" in whole else {"max_tokens": 2}
            answer = client.post(path, json={"model": "tiny"} | limit | whole | changes)
            assert is_answer(answer), (answer.status_code, answer.text)

        send()
        assert client.get("/health").status_code == 200


def test_no_bytes_are_a_500(server: Any) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:

        @settings(max_examples=60, deadline=None, database=None, derandomize=True)
        @given(st.sampled_from([path for path, *_ in ROUTES]), st.binary(max_size=40) | st.text(max_size=20))
        def send(path: str, body: bytes | str) -> None:
            answer = client.post(path, content=body)
            assert answer.status_code == 400 and is_answer(answer)

        send()


def test_a_deep_body_is_a_400(server: Any) -> None:
    deep = b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    answer = httpx.post(server.url + "/v1/completions", content=deep)
    assert answer.status_code == 400 and is_answer(answer)
