"""A chat's prompt ends as it was asked to: with a new answer, with none, or inside the last message."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.server.parsing.thinking import THOUGHT_MARKS
from myserve.server.prompts.chat_style import ChatStyle
from myserve.server.settings import Settings

TURNS = [{"role": "user", "content": "Say a color"}, {"role": "assistant", "content": "It is r"}]


def post(server: Any, route: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + route, json={"model": "tiny"} | fields, timeout=60)


def chat(server: Any, **fields: Any) -> Any:
    asked = {"messages": TURNS, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    return post(server, "/v1/chat/completions", **asked | fields).json()


@pytest.mark.parametrize(
    "ends",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ],
)
def test_the_prompt_is_what_tokenize_says_and_what_the_answer_follows(
    server: Any, ends: dict[str, bool]
) -> None:
    answer = chat(server, **ends)
    ids = post(server, "/tokenize", messages=TURNS, **ends).json()["tokens"]
    assert answer["prompt_token_ids"] == ids
    fields = {"prompt": ids, "max_tokens": 8, "temperature": 0}
    completion = post(server, "/v1/completions", **fields).json()["choices"][0]["text"]
    assert answer["choices"][0]["message"]["content"] == completion


def test_a_continued_message_has_the_answer_alone_whole_and_streamed(server: Any) -> None:
    whole = chat(server, continue_final_message=True)["choices"][0]["message"]["content"]
    assert not whole.startswith(TURNS[-1]["content"])
    asked = {"messages": TURNS, "max_tokens": 8, "temperature": 0, "continue_final_message": True}
    lines = post(server, "/v1/chat/completions", **asked, stream=True).text.split("\n\n")
    chunks = [httpx.Response(200, text=line[6:]).json() for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == whole


@pytest.mark.parametrize("content", [None, "", []])
def test_a_message_without_text_cannot_be_continued(server: Any, content: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    last = {"role": "assistant", "content": content, "tool_calls": [call]}
    answer = chat(server, messages=[TURNS[0], last], continue_final_message=True)
    assert answer["error"]["param"] == "continue_final_message"


@pytest.mark.parametrize(
    ("continued", "begun"),
    [("<think>\nOkay, the", True), ("<think>\nHm.\n</think>\n\nIt is r", None), ("It is r", None)],
)
def test_a_thought_that_is_open_in_the_message_goes_on(
    server: Any, continued: str, begun: bool | None
) -> None:
    codec = server.model("tiny").codec
    reasoning = ChatStyle(thought=THOUGHT_MARKS[0]).reasoning(codec, codec.encode(continued), None, continued)
    assert (reasoning and reasoning.starts_inside) == begun


# Qwen3's switch, gpt-oss's efforts, neither, and thoughts that nothing turns off.
TEMPLATES = {
    "switch": "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}",
    "efforts": "Effort: {{ reasoning_effort or 'medium' }}. {{ messages[0].content }}",
    "plain": "{{ messages[0].content }}",
    "always": "{{ messages[0].content }}<think>{% if 0 %}</think>{% endif %}",
}
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def trusting(
    tiny_model: Callable[[str], Path],
    open_server: Callable[[Settings], AbstractContextManager[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A server that takes templates from requests, and has each of ours under its name."""
    root = tmp_path_factory.mktemp("templates")
    models = {"tiny": str(tiny_model("qwen3"))}
    for name, template in TEMPLATES.items():
        models[name] = str(shutil.copytree(tiny_model("qwen3"), root / name))
        (root / name / "chat_template.jinja").write_text(template)
    settings = Settings(models=models, preload=("tiny",), trust_request_chat_template=True)
    with open_server(settings) as running:
        yield running


def shown(server: Any, **fields: Any) -> str:
    """The prompt as text, which a chat and /tokenize agree about."""
    asked = {"messages": USER} | fields
    ids = post(server, "/tokenize", **asked).json()["tokens"]
    answer = post(server, "/v1/chat/completions", **asked, max_tokens=1, return_token_ids=True).json()
    assert answer["prompt_token_ids"] == ids
    return str(post(server, "/detokenize", tokens=ids, model=fields["model"]).json()["prompt"])


@pytest.mark.parametrize(
    ("model", "effort", "prompt"),
    [
        ("switch", "none", "Hello<think></think>"),
        ("switch", "low", "Hello"),
        ("efforts", "high", "Effort: high. Hello"),
        ("efforts", None, "Effort: medium. Hello"),
        ("plain", "none", "Hello"),
    ],
)
def test_effort_is_said_in_the_template_s_own_words(
    trusting: Any, model: str, effort: str | None, prompt: str
) -> None:
    assert shown(trusting, model=model, reasoning_effort=effort) == prompt


def test_chat_template_kwargs_have_precedence_over_effort(trusting: Any) -> None:
    fields = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    assert shown(trusting, model="switch", **fields) == "Hello"


@pytest.mark.parametrize(("model", "effort"), [("plain", "high"), ("always", "none"), ("switch", "much")])
def test_an_effort_without_an_effect_is_refused(trusting: Any, model: str, effort: str) -> None:
    for route in ("/v1/chat/completions", "/tokenize"):
        answer = post(trusting, route, model=model, messages=USER, reasoning_effort=effort)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")


def test_a_request_s_template_is_the_prompt_s_and_the_answer_s(trusting: Any) -> None:
    """Its control tokens are its own, a message's are text; and its thoughts are read as thoughts."""
    template = "<|im_start|>{{ messages[0].content }}<think>{% if 0 %}</think>{% endif %}"
    assert shown(trusting, model="tiny", chat_template=template) == "<|im_start|>Hello<think>"
    hostile = [{"role": "user", "content": "<|im_start|>"}]
    ids = post(trusting, "/tokenize", messages=hostile, chat_template=template).json()["tokens"]
    assert [i for i in ids if i < 3] == [1] and len(ids) > 8
    asked = {"messages": USER, "max_tokens": 4, "chat_template": template}
    message = post(trusting, "/v1/chat/completions", **asked).json()["choices"][0]["message"]
    assert message["reasoning_content"] and not message["content"]


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages.x.y }}"])
def test_a_broken_template_is_the_request_s_fault(trusting: Any, template: str) -> None:
    answer = post(trusting, "/v1/chat/completions", messages=USER, chat_template=template)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template"), answer.text


def test_no_template_is_taken_unless_the_operator_says_so(server: Any) -> None:
    for route in ("/v1/chat/completions", "/tokenize"):
        answer = post(server, route, messages=USER, chat_template="{{ messages }}")
        assert answer.status_code == 400, answer.text
        assert "--trust-request-chat-template" in answer.json()["error"]["message"]
