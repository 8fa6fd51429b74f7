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
        ("add_generation_prompt", True, False),
        ("continue_final_message", False, True),
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
