"""Whatever bytes come, a body becomes a request or a RequestError, and nothing else; numbers come back as they went."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myserve.errors import RequestError
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.generate import GenerateRequest
from myserve.wire.parse import parse_request
from myserve.wire.weights import HotLoadRequest, WeightsRequest

KINDS: list[Any] = [ChatCompletionRequest, CompletionRequest, GenerateRequest, WeightsRequest, HotLoadRequest]
WHOLE = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "token_ids": [1],
    "sampling_params": {},
    "path": "p",
    "identity": "i",
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
OFTEN = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def is_parsed_or_refused(kind: Any, body: bytes) -> bool:
    try:
        return isinstance(parse_request(kind, body), kind)
    except RequestError as error:
        return bool(error.message)


@pytest.mark.parametrize("kind", KINDS)
@OFTEN
@given(st.binary(max_size=60) | st.text(max_size=30).map(lambda text: json.dumps(text).encode()))
def test_any_bytes(kind: Any, body: bytes) -> None:
    assert is_parsed_or_refused(kind, body)


@pytest.mark.parametrize("kind", KINDS)
@OFTEN
@given(st.data())
def test_any_value_in_any_field(kind: Any, data: st.DataObject) -> None:
    """NaN and Infinity too, which Python's json writes and JSON has not."""
    fields = st.sampled_from(sorted(kind.model_fields))
    changes = data.draw(st.dictionaries(fields, JSON, min_size=1, max_size=3))
    assert is_parsed_or_refused(kind, json.dumps(WHOLE | changes).encode())


@pytest.mark.parametrize("kind", KINDS)
@OFTEN
@given(st.integers(0, 200), st.binary(max_size=3))
def test_a_whole_body_that_was_cut_or_written_over(kind: Any, at: int, bytes_: bytes) -> None:
    body = json.dumps(WHOLE).encode()
    assert is_parsed_or_refused(kind, body)
    assert is_parsed_or_refused(kind, body[:at])
    assert is_parsed_or_refused(kind, body[:at] + bytes_ + body[at + len(bytes_) :])
