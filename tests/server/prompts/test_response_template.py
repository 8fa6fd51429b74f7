"""A tokenizer's own response template says how calls are read, where its chat template shows no form that is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from myserve.errors import RequestError
from myserve.server.parsing.tool_calls import Arguments, CallReader, CallStart, Text
from myserve.server.parsing.tool_styles import HERMES, ToolStyle
from myserve.server.prompts.call_grammars import forced_calls, rules_of_calls
from myserve.server.prompts.chat_style import ChatStyle
from myserve.wire.structured import Function, Tool

WHOLE = {"type": "function", "function": "{content}"}
LINES = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content}"}}
CALLS: dict[str, dict[str, Any]] = {
    "json": {"content": "json", "transform": WHOLE},
    "lines": {"content": "kv-lines", "transform": LINES},
}


def spec(calls: dict[str, Any]) -> dict[str, Any]:
    return {
        "start_anchor": "<|im_start|>assistant",
        "fields": {
            "content": {},
            "thinking": {"open": "<(", "close": ")>"},
            "tool_calls": {"open": "<[", "close": "]>", "repeats": True} | calls,
        },
    }


@pytest.fixture(params=CALLS)
def style(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path: Path) -> ChatStyle:
    """Read off a folder, as a download has it."""
    folder = shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.response_template = spec(CALLS[request.param])
    tokenizer.save_pretrained(folder)
    return ChatStyle.of(AutoTokenizer.from_pretrained(folder))


def read(style: ToolStyle, parts: list[str]) -> list[Any]:
    reader = CallReader(style, {"f"})
    pieces = [*(piece for part in parts for piece in reader.feed(part)), *reader.end()]
    names = [piece.name for piece in pieces if isinstance(piece, CallStart)]
    arguments = "".join(piece.text for piece in pieces if isinstance(piece, Arguments))
    return [names, arguments, "".join(piece.text for piece in pieces if isinstance(piece, Text))]


def test_calls_and_thoughts_are_read_by_it(style: ChatStyle) -> None:
    assert style.thought == ("<(", ")>") and style.tools is not None
    written = {"json": '{"name": "f", "arguments": {"a": "b"}}', "lines": "name: f\na: b"}
    text, expected = (
        (written["json"], {"a": "b"})
        if style.tools.is_object
        else (written["lines"], {"name": "f", "a": "b"})
    )
    whole = f"Well. <[{text}]>"
    names, arguments, said = read(style.tools, [whole])
    assert (names, json.loads(arguments), said) == (["f"], expected, "Well.")
    assert read(style.tools, list(whole)) == [names, arguments, said]
    for other in (f"<[{text.replace('f', 'g')}]>", "<[x]>", "<[", "a <b"):
        assert read(style.tools, list(other))[::2] == [[], other]


def test_a_call_is_forced_only_where_its_form_is_an_object(style: ChatStyle) -> None:
    assert style.tools is not None
    tools = [Tool(type="function", function=Function(name="f", parameters={"type": "object"}))]
    if style.tools.is_object:
        assert '"<["' in rules_of_calls(tools, style.tools) or "<[" in rules_of_calls(tools, style.tools)
        assert forced_calls(style.tools, one=True) == "call"
    else:
        with pytest.raises(RequestError, match="response template"):
            rules_of_calls(tools, style.tools)


@pytest.mark.parametrize(
    "broken",
    [{}, {"fields": {}}, {"version": 9}, "x", {"start_anchor": "a", "fields": {"x": {"open_pattern": "("}}}],
)
def test_a_response_template_that_cannot_be_read_is_none(
    tiny_model: Callable[[str], Path], broken: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen3"))
    tokenizer.response_template = broken
    assert ChatStyle.of(tokenizer).tools is None


def test_a_form_that_the_chat_template_shows_has_precedence(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen3"))
    tokenizer.response_template = spec(CALLS["json"])
    tokenizer.chat_template = "{{ tools }}<tool_call></tool_call><think></think>"
    style = ChatStyle.of(tokenizer)
    assert (
        style.tools is not None
        and style.tools.name == HERMES.name
        and style.thought == ("<think>", "</think>")
    )
