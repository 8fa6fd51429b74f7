"""The Responses API over a socket: what a stream adds up to, exact turns, what is kept and for whom, and its errors."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest

from myserve.server.routes.body import made_of
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder

ASKED = {"model": "agent", "input": "Say a color", "max_output_tokens": 24, "seed": 3}
TOOL = {
    "type": "function",
    "name": "paint",
    "description": "Paints.",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
}
CUSTOM = {
    "type": "custom",
    "name": "shell",
    "format": {"type": "grammar", "syntax": "regex", "definition": "ls [a-z]{3}"},
}

PATCH = {
    "type": "custom",
    "name": "patch",
    "format": {
        "type": "grammar",
        "syntax": "lark",
        "definition": 'start: "+" /[a-z"]{1,4}/ LF\n%import common.LF',
    },
}


@pytest.fixture
def client(agent_server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{agent_server.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as strict:
        yield strict


def post(server: Any, path: str = "/v1/responses", **fields: Any) -> dict[str, Any]:
    answer = httpx.post(server.url + path, json=ASKED | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def events(server: Any, **fields: Any) -> list[dict[str, Any]]:
    answer = httpx.post(server.url + "/v1/responses", json=ASKED | fields | {"stream": True}, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    read = SSEDecoder().feed(answer.content)
    assert [event.event for event in read] == [event.json()["type"] for event in read]
    return [event.json() for event in read]


def text_of(body: dict[str, Any]) -> str:
    return "".join(
        part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"]
    )


def without_names(value: Any) -> Any:
    """Return an answer without what is another each time: ids, times, what was cached."""
    if isinstance(value, dict):
        changing = ("id", "call_id", "item_id", "created_at", "completed_at", "cached_tokens")
        return {key: without_names(item) for key, item in value.items() if key not in changing}
    return [without_names(item) for item in value] if isinstance(value, list) else value


def added_up(stream: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items that a stream's deltas make, checking each event's place."""
    items: list[dict[str, Any]] = []
    for event in stream:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
            continue
        if "item_id" in event:
            item = items[event["output_index"]]
            assert item["id"] == event["item_id"]
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind == "output_text.delta":
            item["content"][0]["text"] += event["delta"]
            item["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "reasoning_text.delta":
            item["content"][0]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "custom_tool_call_input.delta":
            item["input"] += event["delta"]
        elif kind == "output_item.done":
            assert items[-1]["status"] == "in_progress"
            items[-1]["status"] = event["item"]["status"]
            if "encrypted_content" in event["item"]:
                items[-1]["encrypted_content"] = event["item"]["encrypted_content"]
            assert items[-1] == event["item"]
    return items


VARIANTS: list[dict[str, Any]] = [
    {},
    {"stop": ["e", "o"]},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "logprobs": True, "return_token_ids": True},
    {"model": "thinker"},
    {"model": "thinker", "thinking_token_budget": 4, "include": ["message.output_text.logprobs"]},
    {"model": "thinker", "thinking_token_budget": 4, "include": ["reasoning.encrypted_content"]},
    {"model": "thinker", "include_reasoning": False, "thinking_token_budget": 4},
    {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 120},
    {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 12},
    {"tools": [TOOL, CUSTOM], "tool_choice": {"type": "custom", "name": "shell"}, "max_output_tokens": 120},
    {"tools": [TOOL, PATCH], "tool_choice": {"type": "custom", "name": "patch"}, "max_output_tokens": 120},
    {"tools": [TOOL], "tool_choice": "required", "model": "thinker", "reasoning": {"effort": "low"}},
    {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"enum": [1, 22]}}}},
    {"max_output_tokens": 1, "logit_bias": {"2": 100}},
]  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS, ids=range(len(VARIANTS)))
def test_a_stream_adds_up_to_the_whole_answer(agent_server: Any, fields: dict[str, Any]) -> None:
    whole, stream = post(agent_server, **fields), events(agent_server, **fields)
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert [event["type"] for event in stream[:2]] == ["response.created", "response.in_progress"]
    assert stream[0]["response"]["seed"] == 3 and stream[0]["response"]["output"] == []
    last = stream[-1]
    assert last["type"] == ("response.completed" if whole["status"] == "completed" else "response.incomplete")
    assert without_names(last["response"]) == without_names(whole)
    assert added_up(stream) == last["response"]["output"]


@pytest.mark.parametrize("model", ["agent", "thinker"])
def test_a_seed_has_one_text_on_all_routes(agent_server: Any, model: str) -> None:
    asked = (
        {"model": model, "seed": 11, "thinking_token_budget": 5}
        if model == "thinker"
        else {"model": model, "seed": 11}
    )
    messages = [{"role": "user", "content": "Say a color"}]
    chat = httpx.post(
        agent_server.url + "/v1/chat/completions",
        json=asked | {"messages": messages, "max_tokens": 24},
        timeout=60,
    ).json()["choices"][0]["message"]
    answer = post(agent_server, **asked)
    assert text_of(answer) == chat["content"]
    thoughts = [item["content"][0]["text"] for item in answer["output"] if item["type"] == "reasoning"]
    assert "".join(thoughts) == chat.get("reasoning_content", "")
    assert text_of(post(agent_server, **asked | {"seed": 12})) != chat["content"]


def test_logprobs_are_those_of_the_text_s_tokens(agent_server: Any) -> None:
    asked = {"include": ["message.output_text.logprobs"], "logprobs": True}
    answer = post(agent_server, **asked)
    (part,) = answer["output"][0]["content"]
    listed = answer["logprobs"]["content"]
    assert [entry["token_id"] for entry in part["logprobs"]] == [entry["token_id"] for entry in listed]
    assert (
        bytes(b for entry in part["logprobs"] for b in entry["bytes"]).decode("utf-8", "replace")
        == part["text"]
    )
    thinking = asked | {"model": "thinker", "thinking_token_budget": 4, "max_output_tokens": 40}
    answer = post(agent_server, **thinking)
    part = answer["output"][-1]["content"][0]
    assert 0 < len(part["logprobs"]) < len(answer["logprobs"]["content"])
    said = bytes(b for entry in part["logprobs"] for b in entry["bytes"]).decode("utf-8", "replace")
    assert said.strip("\n") == part["text"].strip("\n")


# ---- with openai's client


class Point(pydantic.BaseModel):
    x: int
    y: int | None


def test_the_strict_client_creates_streams_and_parses(client: openai.OpenAI) -> None:
    whole = client.responses.create(
        model="thinker", input="hi", max_output_tokens=60, extra_body={"seed": 1, "thinking_token_budget": 4},
        include=["message.output_text.logprobs"], top_logprobs=1, reasoning={"effort": "low", "summary": "auto"},
    )  # fmt: skip
    assert whole.output_text and whole.usage and whole.usage.output_tokens == 60
    assert whole.model_extra and "reasoning.summary" in whole.model_extra["warnings"][0]
    parsed = client.responses.parse(
        model="agent",
        input=[{"role": "user", "content": "A point"}],
        text_format=Point,
        max_output_tokens=120,
        extra_body={"seed": 2},
    )
    assert isinstance(parsed.output_parsed, Point)
    tool = openai.pydantic_function_tool(Point, name="draw")["function"]
    with client.responses.stream(
        model="agent", input="hi", max_output_tokens=120, tool_choice="required", extra_body={"seed": 3},
        parallel_tool_calls=False,
        tools=[{"type": "function", "name": "draw", "parameters": tool["parameters"], "strict": True}],
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert final.output[0].type == "function_call"


def test_a_call_and_its_output_come_back(client: openai.OpenAI) -> None:
    tools: Any = [TOOL, CUSTOM]
    asked: Any = {"model": "agent", "tools": tools, "max_output_tokens": 120, "extra_body": {"seed": 5}}
    said: list[Any] = [{"role": "user", "content": "paint"}]
    first = client.responses.create(input=said, tool_choice={"type": "custom", "name": "shell"}, **asked)
    (call,) = first.output
    assert call.type == "custom_tool_call" and call.input.startswith("ls ")
    said += [
        call.model_dump(exclude_none=True),
        {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "x"},
    ]
    second = client.responses.create(input=said, tool_choice="required", parallel_tool_calls=False, **asked)
    (again,) = second.output
    assert again.type in ("function_call", "custom_tool_call")
    output: Any = {
        "type": f"{again.type}_output",
        "call_id": again.call_id,
        "output": [{"type": "input_text", "text": "y"}],
    }
    third = client.responses.create(
        previous_response_id=second.id, input=[output], tool_choice="none", **asked
    )
    assert third.output_text
    items = client.responses.input_items.list(third.id)
    assert [item.type for item in items] == [f"{again.type}_output"]
    ordered = client.responses.input_items.list(
        second.id, order="asc", limit=2
    )  # it asks for the other pages
    assert [item.type for item in ordered] == ["message", "custom_tool_call", "custom_tool_call_output"]


# ---- turns


def exact_turns(server: Any, model: str, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    asked = {"model": model, "return_token_ids": True} | fields
    first = post(server, **asked)
    return first, post(server, **asked, previous_response_id=first["id"], input="And another")


@pytest.mark.parametrize("fields", [{"model": "agent"}, {"model": "thinker", "thinking_token_budget": 6}])
def test_earlier_turns_are_the_ids_that_were_drawn(agent_server: Any, fields: dict[str, Any]) -> None:
    first, second = exact_turns(agent_server, **fields)
    drawn = first["prompt_token_ids"] + first["token_ids"]
    assert second["prompt_token_ids"][: len(drawn)] == drawn
    assert second["warnings"] == []
    third = post(
        agent_server, **fields, return_token_ids=True, previous_response_id=second["id"], input="More"
    )
    drawn = second["prompt_token_ids"] + second["token_ids"]
    assert third["prompt_token_ids"][: len(drawn)] == drawn


def test_control_the_same_items_as_text_have_other_ids(agent_server: Any) -> None:
    first, second = exact_turns(agent_server, "agent")
    said = [
        {"role": "user", "content": ASKED["input"]},
        *first["output"],
        {"role": "user", "content": "And another"},
    ]
    as_text = post(agent_server, return_token_ids=True, input=said)
    assert as_text["prompt_token_ids"] != second["prompt_token_ids"]


def test_other_instructions_are_said_to_cost_the_exact_turns(agent_server: Any) -> None:
    first = post(agent_server)
    second = post(
        agent_server, previous_response_id=first["id"], instructions="Be brief", return_token_ids=True
    )
    assert "instructions changed" in second["warnings"][0]
    assert text_of(first)  # and the turn itself is there
    tokens = httpx.post(
        agent_server.url + "/detokenize", json={"model": "agent", "tokens": second["prompt_token_ids"]}
    ).json()["prompt"]
    assert "Be brief" in tokens and text_of(first) in tokens


def test_thoughts_come_back_by_their_seal(agent_server: Any) -> None:
    asked = {"model": "thinker", "thinking_token_budget": 6, "include": ["reasoning.encrypted_content"]}
    first = post(agent_server, **asked)
    thought = {k: v for k, v in first["output"][0].items() if k not in ("content", "status")}
    said = [
        {"role": "user", "content": "hi"},
        thought,
        first["output"][1],
        {"role": "user", "content": "go on"},
    ]
    assert post(agent_server, **asked, input=said)["warnings"] == []
    foreign = thought | {"encrypted_content": "gAAAA"}
    warned = post(agent_server, **asked, input=[said[0], foreign, *said[2:]])
    assert "another server" in warned["warnings"][0]
    torn = thought | {"encrypted_content": thought["encrypted_content"][:-4] + "AAAA"}
    answer = httpx.post(agent_server.url + "/v1/responses", json=ASKED | asked | {"input": [said[0], torn]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input[1].encrypted_content"


def test_the_oldest_messages_go_where_that_is_asked_for(agent_server: Any) -> None:
    call = {"type": "function_call", "call_id": "a", "name": "paint", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "a", "output": "x" * 900}
    said = [{"role": "user", "content": "y" * 1500}, call, output, {"role": "user", "content": "Say a color"}]
    asked = {"input": said, "instructions": "Be brief", "return_token_ids": True}
    refused = httpx.post(agent_server.url + "/v1/responses", json=ASKED | asked)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    shortened = post(agent_server, **asked, truncation="auto")
    assert shortened["warnings"] == ["truncation: the 1 oldest messages were left out of the prompt"]
    assert (
        shortened["prompt_token_ids"] == post(agent_server, **asked | {"input": said[1:]})["prompt_token_ids"]
    )
    fits = post(agent_server, **asked | {"input": said[1:]}, truncation="auto")
    assert fits["warnings"] == []


LARGE = 10**30


@pytest.mark.parametrize("stream", [False, True])
def test_integers_of_any_size_come_back_as_they_were_sent(agent_server: Any, stream: bool) -> None:
    tool = TOOL | {"parameters": {"type": "object", "properties": {}, "description": "d", "x-most": LARGE}}
    said = [{"type": "mcp_call", "id": "m", "x": [-LARGE]}, {"role": "user", "content": "hi"}]
    fields = {"input": said, "tools": [tool], "tool_choice": "none", "max_tool_calls": LARGE}
    asked = ASKED | fields | {"stream": stream}
    answer = httpx.post(agent_server.url + "/v1/responses", json=asked, timeout=60)
    last = answer.text.strip().rpartition("\ndata: ")[
        2
    ]  # the SSE decoder's JSON makes floats of such integers
    body = json.loads(last)["response"] if stream else answer.json()
    assert body["max_tool_calls"] == body["tools"][0]["parameters"]["x-most"] == LARGE
    kept = httpx.get(f"{agent_server.url}/v1/responses/{body['id']}")
    assert kept.json()["max_tool_calls"] == LARGE
    listed = httpx.get(f"{agent_server.url}/v1/responses/{body['id']}/input_items?order=asc").json()["data"]
    assert listed[0]["x"] == [-LARGE] and listed[1]["id"].startswith("msg_")
    assert post(agent_server, previous_response_id=body["id"])["warnings"]


def test_a_thought_with_a_summary_alone_is_left_out_with_a_word(agent_server: Any) -> None:
    thought = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm."}]}
    said = [{"role": "user", "content": "hi"}, thought, {"role": "user", "content": "and?"}]
    (word,) = post(agent_server, input=said)["warnings"]
    assert word.startswith("input[1]: a thought was left out")
    assert post(agent_server, input=[said[0], thought | {"summary": []}, said[2]])["warnings"] == []


def test_a_long_conversation_is_read_in_a_thread() -> None:
    here = threading.current_thread()
    assert asyncio.run(made_of(10, threading.current_thread)) is here
    assert asyncio.run(made_of(10_000, threading.current_thread)) is not here


def test_a_session_keeps_turns_that_come_back_as_items(agent_server: Any) -> None:
    fields = {"model": "thinker", "thinking_token_budget": 6, "return_token_ids": True, "store": False}
    headers = {"x-session-id": "responses"}

    def ask(said: list[dict[str, Any]], **headers: str) -> Any:
        body = ASKED | fields | {"input": said}
        return httpx.post(agent_server.url + "/v1/responses", json=body, headers=headers, timeout=60).json()

    said = [{"role": "user", "content": "Say a color"}]
    first = ask(said, **headers)
    said += [*first["output"], {"role": "user", "content": "Another"}]
    second = ask(said, **headers)
    drawn = first["prompt_token_ids"] + first["token_ids"]
    assert second["prompt_token_ids"][: len(drawn)] == drawn
    assert second["session"]["kept_tokens"] == len(drawn) and second["session"]["continues"] == 0
    assert ask(said)["prompt_token_ids"][: len(drawn)] != drawn


CODEX = {  # as Codex sends it, with fewer tools
    "model": "agent",
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be careful."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
    ],
    "tools": [
        TOOL | {"strict": False},
        {"type": "custom", "name": "apply_patch", "description": "Edits.",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
        {"type": "namespace", "name": "mcp__files", "description": "", "tools": [TOOL]},
        {"type": "web_search", "external_web_access": False},
        {"type": "tool_search", "execution": "client", "description": "", "parameters": {}},
        {"type": "image_generation", "output_format": "png"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0197",
    "text": {"verbosity": "low"},
    "client_metadata": {"x-codex-installation-id": "0"},
    "max_output_tokens": 24,
}  # fmt: skip


def test_what_codex_sends_is_answered(agent_server: Any) -> None:
    answer = httpx.post(agent_server.url + "/v1/responses", json=CODEX, timeout=60)
    read = SSEDecoder().feed(answer.content)
    assert read[-1].event in ("response.completed", "response.incomplete")
    words = read[-1].json()["response"]["warnings"]
    assert [word.split(" ")[0].rstrip(":") for word in words] == [
        *("tools[3]", "tools[4]", "tools[5]", "effort", "text.verbosity", "reasoning.summary")
    ]


# ---- what is kept


def test_an_answer_can_be_asked_for_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(model="agent", input="hi", max_output_tokens=3, metadata={"a": "b"})
    assert client.responses.retrieve(made.id) == made
    items = client.responses.input_items.list(made.id)
    assert [item.type for item in items] == ["message"]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="agent", input="hi", previous_response_id=made.id)
    assert caught.value.code == "previous_response_not_found"
    unkept = client.responses.create(model="agent", input="hi", max_output_tokens=3, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_an_item_can_be_referred_to(agent_server: Any) -> None:
    first = post(agent_server, return_token_ids=True)
    said = [{"role": "user", "content": "a"}, {"type": "item_reference", "id": first["output"][0]["id"]}]
    answer = post(agent_server, input=said, return_token_ids=True)
    spelled = post(agent_server, input=[said[0], first["output"][0]], return_token_ids=True)
    assert answer["prompt_token_ids"] == spelled["prompt_token_ids"]
    lost = httpx.post(agent_server.url + "/v1/responses", json=ASKED | {"input": [{"id": "msg_0"}]})
    assert lost.json()["error"]["code"] == "item_not_found"


def test_answers_are_their_key_owner_s_alone(
    open_server: Callable[[Settings], AbstractContextManager[Any]], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sk-a alice\nsk-b bob\n")
    with open_server(
        Settings(models={"agent": "x"}, force_echo=True, api_keys_file=str(tmp_path / "keys"))
    ) as server:
        alice, bob = ({"authorization": f"Bearer sk-{name}"} for name in "ab")
        made = httpx.post(server.url + "/v1/responses", json=ASKED, headers=alice).json()
        path = f"{server.url}/v1/responses/{made['id']}"
        assert httpx.get(path, headers=alice).json() == made
        assert [httpx.request(verb, path, headers=bob).status_code for verb in ("GET", "DELETE")] == [
            404,
            404,
        ]
        assert httpx.post(path + "/cancel", headers=bob).status_code == 404
        goes_on = ASKED | {"previous_response_id": made["id"]}
        assert httpx.post(server.url + "/v1/responses", json=goes_on, headers=bob).status_code == 400
        assert httpx.post(server.url + "/v1/responses", json=goes_on, headers=alice).status_code == 200


def test_a_failure_on_the_way_is_told_and_kept(
    open_server: Callable[[Settings], AbstractContextManager[Any]], tiny_model: Callable[[str], Path]
) -> None:
    with open_server(Settings(models={"agent": str(tiny_model("qwen3"))})) as server:
        body = ASKED | {"max_output_tokens": 480, "ignore_eos": True, "stream": True}
        decoder = SSEDecoder()
        with httpx.stream("POST", server.url + "/v1/responses", json=body, timeout=60) as running:
            parts = running.iter_bytes()
            read = decoder.feed(next(parts))
            server.model("agent").engine.shutdown()
            for part in parts:
                read += decoder.feed(part)
        assert [event.event for event in read[-2:]] == ["error", "response.failed"]
        failed = read[-1].json()
        assert [event.json()["sequence_number"] for event in read] == list(range(len(read)))
        assert failed["response"]["status"] == "failed"
        assert failed["response"]["error"]["code"] == "server_error"
        assert httpx.get(f"{server.url}/v1/responses/{failed['response']['id']}").json() == failed["response"]


# ---- in the background


def test_a_response_in_the_background_ends_as_one_that_was_waited_for(
    client: openai.OpenAI, agent_server: Any
) -> None:
    whole = post(agent_server)
    begun = client.responses.create(
        model="agent", input="Say a color", max_output_tokens=24, background=True, extra_body={"seed": 3}
    )
    assert begun.status in ("queued", "in_progress")
    while (now := client.responses.retrieve(begun.id)).status in ("queued", "in_progress"):
        pass
    assert now.output_text == text_of(whole) and now.status == whole["status"]
    assert client.responses.cancel(begun.id).status == whole["status"]  # it has ended: it stays as it is


def test_a_stream_in_the_background_can_be_taken_up_again(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "agent",
        "input": "Say a color",
        "max_output_tokens": 24,
        "extra_body": {"seed": 3},
    }
    stream = client.responses.create(**asked, background=True, stream=True)
    first = next(iter(stream))
    assert first.type == "response.created"
    stream.close()
    rest = list(
        client.responses.retrieve(first.response.id, stream=True, starting_after=first.sequence_number)
    )
    assert [event.sequence_number for event in rest] == list(range(1, len(rest) + 1))
    assert rest[-1].type in ("response.completed", "response.incomplete")
    late = list(client.responses.retrieve(first.response.id, stream=True))
    assert [event.sequence_number for event in late] == list(range(len(rest) + 1))


def test_a_stream_with_nothing_more_to_tell_leaves_its_connection_whole(agent_server: Any) -> None:
    with httpx.Client(base_url=agent_server.url, timeout=60) as one:
        asked = ASKED | {"background": True, "stream": True}
        told = SSEDecoder().feed(one.post("/v1/responses", json=asked).content)
        path = f"/v1/responses/{told[0].json()['response']['id']}?stream=true"
        last = one.get(f"{path}&starting_after={len(told) - 2}")
        assert len(SSEDecoder().feed(last.content)) == 1
        nothing = one.get(f"{path}&starting_after=1000000")
        assert (nothing.status_code, nothing.content) == (200, b"")
        assert one.get("/health").status_code == 200


def test_items_are_listed_with_the_ids_that_they_keep(agent_server: Any) -> None:
    asked = ASKED | {"background": True, "max_output_tokens": 200, "ignore_eos": True}
    path = f"{agent_server.url}/v1/responses"
    run = httpx.post(path, json=asked).json()["id"]
    first = httpx.get(f"{path}/{run}/input_items").json()["data"]
    httpx.post(f"{path}/{run}/cancel")
    assert httpx.get(f"{path}/{run}/input_items").json()["data"] == first


def test_one_in_the_background_can_be_cancelled(agent_server: Any) -> None:
    begun = post(agent_server, background=True, max_output_tokens=1500, ignore_eos=True)
    path = f"{agent_server.url}/v1/responses/{begun['id']}"
    ended = httpx.post(path + "/cancel", timeout=60).json()
    assert ended["status"] == "cancelled"
    assert httpx.get(path).json() == ended
    waited_for = post(agent_server)
    refused = httpx.post(f"{agent_server.url}/v1/responses/{waited_for['id']}/cancel")
    assert refused.status_code == 400


def test_many_in_the_background_at_once(agent_server: Any) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{agent_server.url}/v1", api_key="any", max_retries=0
        ) as client:
            make = client.responses.create
            asked: Any = {"model": "agent", "input": "hi", "max_output_tokens": 5, "background": True}
            begun = await asyncio.gather(*(make(**asked, extra_body={"seed": 4}) for _ in range(20)))
            texts = set()
            for each in begun:
                while (now := await client.responses.retrieve(each.id)).status == "in_progress":
                    await asyncio.sleep(0.01)
                texts.add(now.output_text)
            return list(texts)

    assert len(asyncio.run(ask())) == 1


# ---- tools of other kinds, and what has no effect


def test_tools_of_providers_are_left_out_with_a_word(agent_server: Any) -> None:
    tools = [
        {"type": "web_search"},
        {"type": "tool_search", "execution": "client"},
        {"type": "mcp", "server_label": "x"},
        TOOL,
    ]
    answer = post(agent_server, tools=tools, return_token_ids=True)
    assert [word.split(":")[0] for word in answer["warnings"]] == ["tools[0]", "tools[1]", "tools[2]"]
    assert answer["tools"] == [TOOL]
    alone = post(agent_server, tools=[TOOL], return_token_ids=True)
    assert alone["warnings"] == [] and alone["prompt_token_ids"] == answer["prompt_token_ids"]
    nothing = post(agent_server, tools=tools[:1], tool_choice="required")
    assert len(nothing["warnings"]) == 2


def test_a_namespace_s_tools_are_offered_and_called_by_both_names(agent_server: Any) -> None:
    spaces = [
        {"type": "namespace", "name": space, "description": "", "tools": [TOOL]}
        for space in ("mcp__a", "mcp__b")
    ]
    asked = {"tools": spaces, "max_output_tokens": 120}
    answer = post(
        agent_server, **asked, tool_choice={"type": "function", "name": "paint", "namespace": "mcp__b"}
    )
    (call,) = answer["output"]
    assert (call["namespace"], call["name"]) == ("mcp__b", "paint")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "done"}
    said = [{"role": "user", "content": "x"}, call, output]
    assert post(agent_server, **asked, input=said, tool_choice="none")["warnings"] == []
    allowed = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "paint", "namespace": "mcp__a"}],
    }
    (call,) = post(agent_server, **asked, tool_choice=allowed, parallel_tool_calls=False)["output"]
    assert call["namespace"] == "mcp__a"


def test_an_effort_is_what_the_template_knows_of_it(agent_server: Any) -> None:
    asked = {"model": "thinker", "max_output_tokens": 40, "ignore_eos": True}
    used = {
        effort: post(agent_server, **asked, reasoning={"effort": effort})["usage"]["output_tokens_details"]
        for effort in ("none", "low")
    }
    assert used["none"] == {"reasoning_tokens": 0} and used["low"]["reasoning_tokens"] > 0
    plain = post(agent_server, reasoning={"effort": "high"})
    assert "has no effect" in plain["warnings"][0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "sculpture"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "a"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
        ({"include": ["everything"]}, "include[0]"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x " * 4000}, "input"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(
    agent_server: Any, fields: dict[str, Any], param: str
) -> None:
    answer = httpx.post(agent_server.url + "/v1/responses", json=ASKED | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_a_model_that_is_not_served_is_a_404(agent_server: Any) -> None:
    assert httpx.post(agent_server.url + "/v1/responses", json=ASKED | {"model": "none"}).status_code == 404


def test_input_tokens_are_those_of_the_prompt(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="agent", input="Say a color", instructions="Be brief")
    made = client.responses.create(
        model="agent", input="Say a color", instructions="Be brief", max_output_tokens=1
    )
    assert made.usage and counted.input_tokens == made.usage.input_tokens
