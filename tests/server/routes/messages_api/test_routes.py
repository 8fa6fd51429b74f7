"""The Messages API over a socket, by the bytes that Anthropic's client sends: blocks, events, thoughts, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.engine.config import EngineConfig
from myserve.server.routes.messages_api.output import called_input
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder

# what anthropic 2.14 sends with `messages.create`; earlier ones send x-api-key
HEADERS = {
    "accept": "application/json",
    "content-type": "application/json",
    "user-agent": "Anthropic/Python 2.14.0",
    "authorization": "Bearer any",
    "anthropic-version": "2026-10-21",
    "x-stainless-retry-count": "0",
    "x-stainless-timeout": "600",
}
USER = [{"role": "user", "content": "Say a color"}]
ASKED = {"model": "agent", "max_tokens": 24, "messages": USER, "seed": 3}
TOOL = {
    "name": "paint",
    "description": "Paints.",
    "input_schema": {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "cache_control": {"type": "ephemeral"},
}
SYSTEM = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]


def send(server: Any, body: dict[str, Any], path: str = "/v1/messages") -> httpx.Response:
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return httpx.post(server.url + path, content=content, headers=HEADERS, timeout=60)


def post(server: Any, **fields: Any) -> dict[str, Any]:
    answer = send(server, ASKED | fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    body: dict[str, Any] = answer.json()
    return body


def events(server: Any, **fields: Any) -> list[dict[str, Any]]:
    answer = send(server, ASKED | fields | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    read = SSEDecoder().feed(answer.content)
    assert [event.event for event in read] == [event.json()["type"] for event in read]
    return [event.json() for event in read]


def text_of(body: dict[str, Any]) -> str:
    return "".join(block["text"] for block in body["content"] if block["type"] == "text")


def added_up(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that a stream makes, as Anthropic's client adds it up."""
    message: dict[str, Any] = stream[0]["message"]
    blocks: list[dict[str, Any]] = message["content"]
    written = ""
    for event in stream[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                written = ""
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                kind, delta = event["delta"]["type"], event["delta"]
                if kind == "input_json_delta":
                    written += delta["partial_json"]
                    blocks[-1]["input"] = json.loads(written)
                else:
                    name = kind.removesuffix("_delta")
                    blocks[-1][name] += delta[name]
            case "message_delta":
                message |= {k: v for k, v in event.items() if k not in ("type", "delta")} | event["delta"]
    return message


def without_names(value: Any) -> Any:
    """Return an answer without what is another each time: ids, and what was cached."""
    if isinstance(value, dict):
        changing = ("id", "input_tokens", "cache_read_input_tokens")
        return {key: without_names(item) for key, item in value.items() if key not in changing}
    return [without_names(item) for item in value] if isinstance(value, list) else value


THINKS = {"model": "thinker", "thinking": {"type": "enabled", "budget_tokens": 4}}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"system": SYSTEM, "stop_sequences": ["e", "o"]},
    {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "temperature": 0.7, "top_k": 40},
    THINKS,
    THINKS | {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    THINKS | {"thinking": {"type": "enabled", "budget_tokens": 4, "display": "omitted"}},
    {"model": "thinker", "thinking": {"type": "disabled"}},
    {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 120},
    {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "paint"}, "max_tokens": 14},
    THINKS
    | {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 99},
    {"output_config": {"format": {"type": "json_schema", "schema": {"enum": [1, 22]}}}},
    {"max_tokens": 1, "logit_bias": {"2": 100}},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=range(len(VARIANTS)))
def test_a_stream_adds_up_to_the_whole_message(agent_server: Any, fields: dict[str, Any]) -> None:
    whole, stream = post(agent_server, **fields), events(agent_server, **fields)
    kinds = [event["type"] for event in stream]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert stream[0]["message"]["seed"] == 3 and stream[0]["message"]["stop_reason"] is None
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(whole["content"])
    assert without_names(added_up(stream)) == without_names(whole)


@pytest.mark.parametrize("fields", [{}, THINKS])
def test_a_seed_has_the_text_of_the_chat_route(agent_server: Any, fields: dict[str, Any]) -> None:
    asked = {"model": "agent", "messages": USER, "max_tokens": 24, "seed": 11}
    if fields:
        kwargs = {"enable_thinking": True}
        asked |= {"model": "thinker", "thinking_token_budget": 4, "chat_template_kwargs": kwargs}
    chat = httpx.post(agent_server.url + "/v1/chat/completions", json=asked, timeout=60).json()
    message = post(agent_server, **fields, seed=11)
    said = chat["choices"][0]["message"]
    assert text_of(message) == said["content"]
    thoughts = "".join(block["thinking"] for block in message["content"] if block["type"] == "thinking")
    assert thoughts == said.get("reasoning_content", "")
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert text_of(post(agent_server, **fields, seed=12)) != said["content"]


def test_a_call_and_its_result_come_back(agent_server: Any) -> None:
    asked = {"tools": [TOOL], "max_tokens": 120}
    first = post(agent_server, **asked, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    (call,) = first["content"]
    assert (first["stop_reason"], call["type"], list(call["input"])) == ("tool_use", "tool_use", ["n"])
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "done"}]}
    said = [*USER, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    second = post(agent_server, **asked, messages=said, tool_choice={"type": "none"})
    assert text_of(second) and second["warnings"] == []
    failed = [
        *said[:2],
        {"role": "user", "content": [result | {"is_error": True}, {"type": "text", "text": "and?"}]},
    ]
    assert "is_error" in post(agent_server, **asked, messages=failed)["warnings"][0]


def test_thoughts_are_verified_when_they_come_back(agent_server: Any) -> None:
    for thinking in (THINKS["thinking"], {"type": "enabled", "budget_tokens": 4, "display": "omitted"}):
        asked = {"model": "thinker", "thinking": thinking}
        first = post(agent_server, **asked)
        thought, text = first["content"]
        assert (thinking.get("display") == "omitted") == (thought["thinking"] == "")

        def goes_on(thought: dict[str, Any], text: Any = text, asked: Any = asked) -> httpx.Response:
            turns = [*USER, {"role": "assistant", "content": [thought, text]}, *USER]
            return send(agent_server, ASKED | asked | {"messages": turns})

        assert goes_on(thought).status_code == 200
        changed = [thought | {"thinking": thought["thinking"] + "!"}, thought | {"signature": "x"}]
        changed.append(thought | {"signature": thought["signature"][:-6] + "AAAAAA"})
        for other in changed:
            answer = goes_on(other)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "messages[1].content[0].signature"
            assert answer.json()["type"] == "error"


def test_a_last_message_of_the_assistant_goes_on(agent_server: Any) -> None:
    begun = [*USER, {"role": "assistant", "content": "It is r"}]
    chat = {"model": "agent", "messages": begun, "max_tokens": 24, "seed": 3, "continue_final_message": True}
    answer = httpx.post(agent_server.url + "/v1/chat/completions", json=chat, timeout=60).json()
    assert text_of(post(agent_server, messages=begun)) == answer["choices"][0]["message"]["content"]


def test_a_limit_beyond_the_context_is_the_context(agent_server: Any) -> None:
    full = post(
        agent_server, max_tokens=32_000, ignore_eos=True, messages=[{"role": "user", "content": "x" * 1900}]
    )
    usage = full["usage"]
    assert full["stop_reason"] == "model_context_window_exceeded"
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["output_tokens"] == 2048
    assert post(agent_server, max_tokens=3, ignore_eos=True)["stop_reason"] == "max_tokens"


def test_why_it_stopped(agent_server: Any) -> None:
    stopped = post(agent_server, stop_sequences=["e"], logit_bias={"71": 50}, ignore_eos=True, max_tokens=200)
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "e")
    ended = post(agent_server, logit_bias={"2": 100})
    assert (ended["stop_reason"], ended["stop_sequence"], ended["content"]) == ("end_turn", None, [])


def test_tokens_are_counted_as_they_are_drawn_behind(agent_server: Any) -> None:
    asked = {"system": SYSTEM, "tools": [TOOL]}
    made = post(agent_server, **asked)["usage"]
    counted = send(agent_server, {"model": "agent", "messages": USER} | asked, "/v1/messages/count_tokens")
    assert counted.json() == {"input_tokens": made["input_tokens"] + made["cache_read_input_tokens"]}


def test_what_is_a_provider_s_own_is_left_out_with_a_word(agent_server: Any) -> None:
    tools = [
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "bash_20250124", "name": "bash"},
        TOOL,
    ]
    words = post(agent_server, tools=tools)["warnings"]
    assert [word.split(":")[0] for word in words] == ["tools[0]", "tools[1]"]
    block = {"type": "redacted_thinking", "data": "x"}
    turns = [*USER, {"role": "assistant", "content": [block, {"type": "text", "text": "a"}]}, *USER]
    assert "redacted_thinking" in post(agent_server, messages=turns)["warnings"][0]
    assert (
        "no thoughts"
        in post(agent_server, thinking={"type": "enabled", "budget_tokens": 1024})["warnings"][0]
    )


def test_arguments_are_an_object_whatever_the_model_wrote() -> None:
    whole = '{"a": 1e400, "b": 123456789012345678901234567890}'
    assert called_input(whole, is_cut=False) == whole
    assert json.loads(called_input('{"a": [1, 2', is_cut=True)) == {"a": [1, 2]}
    for written in ("", "{a: 1}", "[1]", '{"a": NaN}', "{" * 100_000):
        for is_cut in (False, True):
            assert isinstance(json.loads(called_input(written, is_cut=is_cut)), dict)


def test_a_session_keeps_turns_that_come_back_as_blocks(agent_server: Any) -> None:
    """A call's arguments come back parsed, and its thought is dropped by the template: the drawn ids stay."""
    fields = {"tools": [TOOL], "max_tokens": 120, "return_token_ids": True, **THINKS}
    headers = HEADERS | {"x-claude-code-session-id": "messages"}

    def ask(said: list[dict[str, Any]], headers: dict[str, str], **more: Any) -> Any:
        body = ASKED | fields | {"messages": said} | more
        return httpx.post(agent_server.url + "/v1/messages", json=body, headers=headers, timeout=60).json()

    first = ask(USER, headers, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    result = {"type": "tool_result", "tool_use_id": first["content"][-1]["id"], "content": "done"}
    said = [*USER, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    second = ask(said, headers)
    drawn = first["prompt_token_ids"] + first["token_ids"]
    assert second["prompt_token_ids"][: len(drawn)] == drawn
    assert second["session"]["kept_tokens"] == len(drawn)
    assert ask(said, HEADERS)["prompt_token_ids"][: len(drawn)] != drawn


# ---- errors, in Anthropic's shape


def is_error(answer: httpx.Response, status: int, kind: str) -> bool:
    body = answer.json()
    return (
        answer.status_code == status
        and body["type"] == "error"
        and body["error"]["type"] == kind
        and set(body["error"]) - {"details"} == {"type", "message", "param", "code"}
        and body["error"].get("details", {}).get("error_code") == body["error"]["code"]
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
         "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": []}]}, "continue_final_message"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"temperature": -1}, "temperature"),
        ({"n": 2}, "n"),
        ({"thread": {"type": "create"}}, "thread"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_a_400_that_names_it(
    agent_server: Any, fields: dict[str, Any], param: str
) -> None:
    answer = send(agent_server, ASKED | fields)
    assert is_error(answer, 400, "invalid_request_error"), answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_errors_of_http_and_of_the_edge_have_the_shape_too(
    open_server: Callable[[Settings], AbstractContextManager[Any]], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sk-a alice\n")
    settings = Settings(
        models={"agent": "x"}, force_echo=True, api_keys_file=str(tmp_path / "keys"), max_body_bytes=5000
    )
    with open_server(settings) as server:

        def ask(body: dict[str, Any], path: str = "/v1/messages", **headers: str) -> httpx.Response:
            return httpx.post(server.url + path, json=body, headers=headers)

        assert is_error(ask(ASKED), 401, "authentication_error")
        assert is_error(ask(ASKED, **{"x-api-key": "sk-b"}), 401, "authentication_error")
        assert is_error(ask(ASKED, "/v1/messages/batches", **{"x-api-key": "sk-a"}), 404, "not_found_error")
        assert is_error(ask(ASKED | {"model": "none"}, **{"x-api-key": "sk-a"}), 404, "not_found_error")
        large = ASKED | {"system": "x" * 6000}
        assert is_error(ask(large, **{"x-api-key": "sk-a"}), 413, "request_too_large")
        assert is_error(
            httpx.put(server.url + "/v1/messages", headers={"x-api-key": "sk-a"}),
            405,
            "invalid_request_error",
        )
        for headers in ({"x-api-key": "sk-a"}, {"authorization": "Bearer sk-a"}):
            assert ask(ASKED, **headers).status_code == 200
        assert ask(ASKED, authorization="Bearer other", **{"x-api-key": "sk-a"}).status_code == 200


def test_a_full_queue_is_a_429_and_a_failure_on_the_way_an_event(
    open_server: Callable[[Settings], AbstractContextManager[Any]], tiny_model: Callable[[str], Path]
) -> None:
    settings = Settings(models={"agent": str(tiny_model("qwen3"))}, engine=EngineConfig(max_queue=1))
    with open_server(settings) as server:
        full = ASKED | {"max_tokens": 480, "ignore_eos": True, "stream": True}
        decoder = SSEDecoder()
        with httpx.stream("POST", server.url + "/v1/messages", json=full, timeout=60) as running:
            parts = running.iter_bytes()
            read = decoder.feed(next(parts))
            answer = send(server, ASKED)
            server.model("agent").engine.shutdown()
            for part in parts:
                read += decoder.feed(part)
        assert is_error(answer, 429, "rate_limit_error") and int(answer.headers["retry-after"]) >= 1
        assert read[0].event == "message_start"
        assert read[-1].event == read[-1].json()["type"] == "error"
        assert read[-1].json()["error"]["type"] in ("api_error", "overloaded_error")
