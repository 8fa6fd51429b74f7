"""What is accepted, what is refused, and that a refusal names the field and what it found there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from myserve.errors import RequestError
from myserve.wire import parse
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.parse import parse_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_request(ChatCompletionRequest, json.dumps(CHAT | fields).encode())


def completion(prompt: Any, **fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": prompt} | fields).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt).prompts == prompts


def test_content_may_be_parts_or_null() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    roles = ["developer", "system", "user", "tool"]
    messages = [{"role": role, "content": parts} for role in roles] + [{"role": "assistant", "content": None}]
    assert [message.text for message in chat(messages=messages).messages] == ["ab"] * 4 + [""]


def test_null_means_not_sent() -> None:
    """OpenAI's clients send null for what was not given."""
    nulls = dict.fromkeys(set(ChatCompletionRequest.model_fields) - {"model", "messages"})
    assert chat(**nulls) == chat()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": "1"}, "temperature", 'should be a valid number; got "1"'),
        ({"temperature": True}, "temperature", "valid number; got true"),
        ({"n": 1.5}, "n", "valid integer; got 1.5"),
        ({"seed": 1e300}, "seed", "valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1; got 0"),
        ({"n": 129}, "n", "less than or equal to 128; got 129"),
        ({"stop": ["a", 1]}, "stop[1]", "valid string; got 1"),
        ({"messages": []}, "messages", "the list should have at least 1 item"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "Field required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "needs content"),
        ({"messages": [{"role": "me", "content": ""}]}, "messages[0].role", "'developer', 'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "type 'image_url' are not supported",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Field required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs the field 'json_schema'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"logit_bias": {"5": "x"}}, "logit_bias", "to numbers, got 'x' for '5'"),
        ({"logit_bias": {"5": True}}, "logit_bias", "to numbers, got True for '5'"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"bad_words": ["a"] * 1025}, "bad_words", "at most 1024 items"),
        ({"choice": ["a"] * 20_001}, "choice", "at most 20000 items"),
        ({"logprob_token_ids": [1] * 1025}, "logprob_token_ids", "at most 1024 items"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", "at most 128 items"),
        ({"messages": [{"role": "user", "content": ""}] * 16_385}, "messages", "at most 16384 items"),
        ({"noise": "white"}, "noise", "'counter' or 'torch'"),
    ],
)
def test_a_refusal_names_the_field_and_what_it_found(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 10_000])
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(ChatCompletionRequest, body)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"null", b"7", b'"hi"'])
def test_the_body_is_an_object(body: bytes) -> None:
    with pytest.raises(RequestError, match="must be a JSON object"):
        parse_request(ChatCompletionRequest, body)


@pytest.mark.parametrize("prompt", [None, [], [[]], 7, {}, [1, "a"], ["a", 1], [1.5], [[1, None]], [True]])
def test_a_prompt_of_another_form(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt)
    assert (caught.value.param or "").startswith("prompt")


def test_unknown_fields_pass_unless_strict() -> None:
    body = json.dumps(CHAT | {"colour": "red"}).encode()
    parse_request(ChatCompletionRequest, body)
    with pytest.raises(RequestError) as caught:
        parse_request(ChatCompletionRequest, body, strict=True)
    assert caught.value.param == "colour"


def test_strict_knows_the_hints_and_the_idle_values() -> None:
    fields = CHAT | {"user": "x", "metadata": {"a": "b"}, "tools": [], "store": False}
    parse_request(ChatCompletionRequest, json.dumps(fields).encode(), strict=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content[0].x",
        ),
        ({"stream": True, "stream_options": {"include_usage": True, "chunk": 3}}, "stream_options.chunk"),
    ],
)
def test_strict_looks_inside(fields: dict[str, Any], param: str) -> None:
    body = json.dumps(CHAT | fields).encode()
    parse_request(ChatCompletionRequest, body)
    with pytest.raises(RequestError) as caught:
        parse_request(ChatCompletionRequest, body, strict=True)
    assert (caught.value.param, caught.value.code) == (param, "unknown_parameter")


def test_strict_takes_back_an_answer_as_openais_client_dumps_it() -> None:
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "anything"))
    turn = {"role": "assistant", "content": "hi"} | nulls
    parse_request(ChatCompletionRequest, json.dumps(CHAT | {"messages": [turn]}).encode(), strict=True)


@pytest.mark.parametrize(
    "name", ["n", "max_tokens", "min_tokens", "top_k", "seed", "top_logprobs", "priority"]
)
def test_an_integer_may_be_written_with_a_zero_behind_its_point(name: str) -> None:
    """As JSON Schema has it, and R, Lua and PHP write it."""
    assert getattr(chat(**{name: 2.0}), name) == 2
    assert type(getattr(chat(**{name: 2.0}), name)) is int
    assert completion([1, 2]).prompts == [(1, 2)]


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words": [1] * 400_000},
        {"stop": [1] * 400_000},
        {"messages": [1] * 400_000},
        {"tools": [1] * 400_000},
        {"tools": [{"type": "function", "function": {}}] * 30_000},
        {"messages": [{"role": "user", "content": [{"type": "image"}] * 30_000}]},
        {"messages": [{"role": "assistant", "tool_calls": [1] * 400_000}]},
        {"logit_bias": {str(i): "x" for i in range(60_000)}},
        {"choice": [1] * 400_000},
        {"allowed_token_ids": ["x"] * 100_000},
        {"temperature": [{"a": [1] * 10}] * 30_000},
    ],
)
def test_one_complaint_is_enough(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a body in which everything is wrong: to collect a million complaints takes seconds."""
    complaints: list[int] = []

    def count(error: ValidationError, body: bytes) -> RequestError:
        complaints.append(error.error_count())
        return as_request_error(error, body)

    as_request_error = parse._as_request_error
    monkeypatch.setattr(parse, "_as_request_error", count)
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert complaints[0] <= 3  # where a field may have several forms, one of each
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ([7] * 500_002, "500000 values"),
        (["a"] * 131_073, "131072 strings"),
        ([[7]] * 65_537, "65536 lists and objects"),
    ],
)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(prompt: Any, what: str) -> None:
    with pytest.raises(RequestError, match=f"more than {what}") as caught:
        completion(prompt)
    assert caught.value.code == "too_many_values"


@pytest.mark.parametrize("text", [",[{" * 300_000, '\\"' * 300_000, "\\" * 300_001, "é🦄,\n" * 200_000])
def test_what_stands_inside_a_text_is_no_value(text: str) -> None:
    for ascii_only in (True, False):
        body = json.dumps({"model": "m", "prompt": text}, ensure_ascii=ascii_only).encode()
        assert parse_request(CompletionRequest, body).prompt == text


def test_options_of_a_stream_need_a_stream() -> None:
    for stream in (None, False):
        with pytest.raises(RequestError) as caught:
            chat(stream=stream, stream_options={"include_usage": True})
        assert caught.value.param == "stream_options"
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert chat(stream=None, stream_options=None).stream is None


def test_reasoning_has_two_names() -> None:
    def thought(**fields: Any) -> str | None:
        return chat(messages=[{"role": "assistant", "content": "a"} | fields]).messages[0].thought

    assert thought(reasoning="Hm.") == thought(reasoning_content="Hm.") == "Hm."
    assert thought(reasoning=None) is None
    assert thought(reasoning="other", reasoning_content="Hm.") == "Hm."
