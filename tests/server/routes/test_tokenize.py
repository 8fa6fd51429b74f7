"""What `/tokenize` and `/detokenize` are asked has an effect, or is refused by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

USER = [{"role": "user", "content": "hi"}]


def post(server: Any, route: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + route, json=fields, timeout=30)


def test_messages_are_what_the_chat_route_makes_of_them(server: Any) -> None:
    asked = {"model": "tiny", "messages": USER}
    answer = post(server, "/v1/chat/completions", **asked, max_tokens=1, return_token_ids=True).json()
    assert post(server, "/tokenize", **asked).json()["tokens"] == answer["prompt_token_ids"]


def test_tools_are_shown_to_the_template(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = server.model("tiny").codec
    monkeypatch.setattr(codec, "_template", "{{ tools | tojson if tools else 'none' }}")
    tools = [{"type": "function", "function": {"name": "clock"}}]
    shown = post(server, "/tokenize", messages=USER, tools=tools).json()["tokens"]
    assert "clock" in codec.decode(shown)
    assert codec.decode(post(server, "/tokenize", messages=USER).json()["tokens"]) == "none"


def test_special_tokens_are_shown_unless_told_otherwise(server: Any) -> None:
    ids = [1, 60, 2]
    special = server.model("tiny").codec.token_bytes.special_ids
    assert {1, 2} <= special
    shown = post(server, "/detokenize", tokens=ids).json()["prompt"]
    hidden = post(server, "/detokenize", tokens=ids, skip_special_tokens=True).json()["prompt"]
    assert hidden in shown and len(hidden) < len(shown)


@pytest.mark.parametrize(
    ("field", "idle", "value"),
    [
        ("chat_template", None, "{{ messages }}"),
        ("mm_processor_kwargs", {}, {"a": 1}),
    ],
)
def test_what_would_change_the_ids_and_is_not_supported_is_refused(
    server: Any, field: str, idle: object, value: object
) -> None:
    plain = post(server, "/tokenize", messages=USER).json()
    assert post(server, "/tokenize", messages=USER, **{field: idle}).json() == plain
    refused = post(server, "/tokenize", messages=USER, **{field: value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


def text_of(server: Any, **fields: Any) -> str:
    ids = post(server, "/tokenize", **fields).json()["tokens"]
    return str(server.model("tiny").codec.decode(ids, skip_special_tokens=False))


def test_the_answers_beginning_may_be_left_out_and_the_last_message_left_open(server: Any) -> None:
    turns = [*USER, {"role": "assistant", "content": "so"}]
    whole, closed = (
        text_of(server, messages=turns),
        text_of(server, messages=turns, add_generation_prompt=False),
    )
    left_open = text_of(server, messages=turns, continue_final_message=True)
    assert whole.startswith(closed) and len(whole) > len(closed)
    assert closed.startswith(left_open) and left_open.endswith("so")
    assert left_open == text_of(
        server, messages=turns, add_generation_prompt=False, continue_final_message=True
    )


def test_a_message_that_is_continued_cannot_forge_control_tokens(server: Any) -> None:
    special = server.model("tiny").codec.token_bytes
    mark = special[min(special.special_ids)].decode()
    turns = [*USER, {"role": "assistant", "content": f"so {mark}"}]
    asked = {"messages": turns, "continue_final_message": True}
    assert text_of(server, **asked).endswith(f"so {mark}")
    plain = post(server, "/tokenize", **asked | {"messages": [*USER, turns[-1] | {"content": "so "}]})
    ids = post(server, "/tokenize", **asked).json()["tokens"]
    assert sum(i in special.special_ids for i in ids) == sum(
        i in special.special_ids for i in plain.json()["tokens"]
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
        {"prompt": "a", "continue_final_message": True},
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(server: Any, fields: dict[str, Any]) -> None:
    refused = post(server, "/tokenize", **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize("form", ["prompt", "messages", "many messages"])
def test_a_text_that_no_prompt_could_be_is_not_tokenized(
    server: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.model("tiny")
    monkeypatch.setattr(type(model.codec), "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    text = "a" * (model.engine.max_model_len * model.codec.token_bytes.longest + 1)
    parts = [text] if form == "messages" else [text[:40_000]] * (1 + len(text) // 40_000)
    fields = {"prompt": text} if form == "prompt" else {"messages": [USER[0] | {"content": p} for p in parts]}
    answer = post(server, "/tokenize", **fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_text_beyond_the_context_is_counted(server: Any) -> None:
    longest = server.model("tiny").engine.max_model_len
    answer = post(server, "/tokenize", prompt="a b c " * longest).json()
    assert answer["count"] > answer["max_model_len"] == longest


def test_tokens_are_told_one_by_one_for_who_asks(server: Any) -> None:
    ids = [1, 60, 233, 2]
    plain = post(server, "/detokenize", tokens=ids).json()
    told = post(server, "/detokenize", tokens=ids, return_tokens=True).json()
    assert told.pop("tokens") == [
        {
            "token_id": i,
            "token": table[i].decode("utf-8", "replace"),
            "bytes": None if i in (1, 2) else list(table[i]),
        }
        for table in [server.model("tiny").codec.token_bytes]
        for i in ids
    ]
    assert told == plain
