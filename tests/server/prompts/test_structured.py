"""Structured output, tools and thoughts, through the unmodified openai client, on random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from myserve.server.settings import Settings

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall with <tool_call></tool_call>:"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if thinking == 'open' %}<think>\n{% elif thinking == 'off' %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
USER: list[dict[str, Any]] = [{"role": "user", "content": "Count to three:"}]
OFF = {"chat_template_kwargs": {"thinking": "off"}}  # the answer begins at once
OPEN = {"chat_template_kwargs": {"thinking": "open"}}


class Person(pydantic.BaseModel):
    name: str
    age: int
    pets: list[str]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says <|im_end|> nothing",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "day": {"enum": ["today", "tomorrow"]}},
            "required": ["city", "day"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def servers(
    open_server: Callable[[Settings], AbstractContextManager[Any]],
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("hermes") / "model"
    shutil.copytree(tiny_model("qwen3"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with open_server(Settings(models={"hermes": str(folder), "plain": str(tiny_model("qwen3"))})) as running:
        yield running


@pytest.fixture
def ask(servers: Any) -> Iterator[Callable[..., Any]]:
    with openai.OpenAI(
        base_url=f"{servers.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as strict:

        def create(**fields: Any) -> Any:
            fields = {"model": "hermes", "messages": USER, "max_tokens": 120, "extra_body": OFF} | fields
            create: Any = strict.chat.completions.create
            return create(**fields)

        yield create


def joined(chunks: Any) -> dict[int, dict[str, Any]]:
    """A stream's choices as messages."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            message = choices.setdefault(
                choice.index, {"content": "", "thought": "", "calls": [], "finish": None}
            )
            message["content"] += choice.delta.content or ""
            message["thought"] += (choice.delta.model_extra or {}).get("reasoning_content", "")
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(message["calls"])
                    message["calls"].append([call.function.name, ""])
                message["calls"][call.index][1] += call.function.arguments
            message["finish"] = choice.finish_reason or message["finish"]
    return choices


def as_joined(answer: Any) -> dict[int, dict[str, Any]]:
    return {
        choice.index: {
            "content": choice.message.content or "",
            "thought": (choice.message.model_extra or {}).get("reasoning_content", ""),
            "calls": [[c.function.name, c.function.arguments] for c in choice.message.tool_calls or []],
            "finish": choice.finish_reason,
        }
        for choice in answer.choices
    }


# -- the form of the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_pydantic_model_comes_back_every_time(servers: Any, seed: int) -> None:
    with openai.OpenAI(base_url=f"{servers.url}/v1", api_key="any", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model="plain",
            messages=USER,
            response_format=Person,
            max_tokens=100,
            seed=seed,
            n=4,  # type: ignore[arg-type]
        )
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Person)


FORMS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    ({"extra_body": OFF | {"guided_choice": ["red", "green"]}}, lambda text: text in ("red", "green")),
    ({"extra_body": OFF | {"regex": "[ab]{3}c"}}, lambda text: re.fullmatch("[ab]{3}c", text) is not None),
    (
        {"extra_body": OFF | {"structured_outputs": {"json": {"type": "integer"}}}},
        lambda text: isinstance(json.loads(text), int),
    ),
    ({"extra_body": OFF | {"guided_json": '{"enum": [1, "x"]}'}}, lambda text: json.loads(text) in (1, "x")),
    (
        {"extra_body": OFF | {"grammar": 'start: "do" /[0-9]/'}},
        lambda text: re.fullmatch("do[0-9]", text) is not None,
    ),
    ({"response_format": {"type": "text"}}, lambda text: True),
]


@pytest.mark.parametrize("case", range(len(FORMS)))
def test_every_way_to_say_it(ask: Callable[..., Any], case: int) -> None:
    fields, fits = FORMS[case]
    answer = ask(n=4, seed=case, **fields)
    assert all(fits(choice.message.content) for choice in answer.choices)
    assert joined(ask(n=4, seed=case, stream=True, **fields)) == as_joined(answer)


def test_completions_keep_to_it_too(servers: Any) -> None:
    with openai.OpenAI(base_url=f"{servers.url}/v1", api_key="any", max_retries=0) as client:
        answer = client.completions.create(
            model="plain", prompt=["One", "Two"], max_tokens=30, extra_body={"choice": ["uno", "dos"]}
        )
    assert {choice.text for choice in answer.choices} <= {"uno", "dos"}


def test_what_was_cut_short_says_so(ask: Callable[..., Any]) -> None:
    answer = ask(response_format={"type": "json_object"}, max_tokens=20, n=8, seed=1)
    reasons = {choice.model_extra["stop_reason"] for choice in answer.choices}
    assert "max_tokens" in reasons
    assert all(json.loads(choice.message.content) is not None for choice in answer.choices)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extra_body": {"regex": "("}}, "this regex cannot be used"),
        ({"extra_body": {"json_schema": {"not": {}}}}, '"not"'),
        ({"extra_body": {"regex": "a", "choice": ["b"]}}, "send one"),
        (
            {"extra_body": {"structured_outputs": {"structural_tag": "x"}}},
            "the structural tag is not valid JSON",
        ),
        (
            {"extra_body": {"structured_outputs": {"whitespace_pattern": "x"}}},
            "whitespace_pattern is not supported",
        ),
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "are clock"),
        ({"tools": [CLOCK], "model": "plain", "extra_body": {}}, "--tool-style"),
        ({"model": "plain", "extra_body": {"thinking_token_budget": 5}}, "knows no <think>"),
        ({"tools": [CLOCK], "extra_body": OFF | {"regex": "a"}}, "JSON alone"),
    ],
)
def test_a_refusal_says_why(ask: Callable[..., Any], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(words)):
        ask(**fields)


# -- tools ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
def test_a_forced_call_is_valid_every_time(ask: Callable[..., Any], choice: Any) -> None:
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "n": 6, "seed": 3}
    answer = ask(**fields)
    names = set()
    for one in answer.choices:
        assert (one.finish_reason, one.message.content) == ("tool_calls", None)
        for call in one.message.tool_calls:
            names.add(call.function.name)
            arguments = json.loads(call.function.arguments)
            expected = {"city", "day"} if call.function.name == "get_weather" else set()
            assert set(arguments) == expected
    assert names == ({"get_weather", "clock"} if choice == "required" else {"get_weather"})
    streamed = joined(ask(stream=True, **fields))
    assert streamed == as_joined(answer)


def test_calls_come_one_by_one_where_that_is_wanted(ask: Callable[..., Any]) -> None:
    fields = {"tools": [CLOCK], "tool_choice": "required", "n": 12, "seed": 5}
    several = [len(choice.message.tool_calls) for choice in ask(**fields).choices]
    single = [len(c.message.tool_calls) for c in ask(parallel_tool_calls=False, **fields).choices]
    assert max(several) > 1
    assert set(single) == {1}


def test_a_free_answer_may_call_or_speak(ask: Callable[..., Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema()}}
    answer = ask(tools=[WEATHER], response_format=form, n=24, seed=2)
    called = [choice for choice in answer.choices if choice.finish_reason == "tool_calls"]
    spoke = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert called and spoke and len(called) + len(spoke) == 24
    for choice in spoke:
        Person.model_validate_json(choice.message.content)


def test_tools_that_may_not_be_called_are_not_looked_for(ask: Callable[..., Any]) -> None:
    text = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    body = OFF | {"choice": [text]}
    answer = ask(tools=[CLOCK], tool_choice="none", extra_body=body)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"


def test_a_conversation_with_results_goes_on(ask: Callable[..., Any]) -> None:
    first = ask(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, seed=1, max_tokens=60)
    message = first.choices[0].message
    turns = [
        *USER,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
    ]
    second = ask(
        max_tokens=20,
        tools=[WEATHER],
        messages=turns,
        seed=1,
        extra_body=OFF | {"choice": ["It rains."]},
        tool_choice="none",
    )
    assert second.choices[0].message.content == "It rains."
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("arguments", ["", " ", "\n"])
def test_a_call_without_arguments_goes_back_as_an_empty_object(
    ask: Callable[..., Any], arguments: str
) -> None:
    """Clients send it so, and templates iterate it."""

    def prompt(arguments: str) -> list[int]:
        call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": arguments}}
        turns = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
        turns.append({"role": "tool", "tool_call_id": "c", "content": "noon"})
        answer = ask(messages=turns, tools=[CLOCK], max_tokens=1, extra_body=OFF | {"return_token_ids": True})
        ids: list[int] = answer.prompt_token_ids
        return ids

    assert prompt(arguments) == prompt("{}")
    assert prompt(arguments) != prompt('{"a": 1}')  # the control


SHAPES: dict[str, Any] = {
    "none": None,
    "{}": {},
    "empty": {"type": "object", "properties": {}},
    "no type": {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    "or null": {
        "type": ["object", "null"],
        "properties": {"a": {"enum": [1]}},
        "additionalProperties": False,
    },
    "$ref": {"$defs": {"P": {"properties": {"n": {"enum": [7]}}, "required": ["n"]}}, "$ref": "#/$defs/P"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_arguments_are_an_object_whatever_the_tool_says(ask: Callable[..., Any], shape: str) -> None:
    function = {"name": "f"} | ({} if SHAPES[shape] is None else {"parameters": SHAPES[shape]})
    tools = [{"type": "function", "function": function}]
    for seed in range(4):
        answer = ask(
            messages=USER, tools=tools, tool_choice="required", seed=seed, max_tokens=80, extra_body=OFF
        )
        for call in answer.choices[0].message.tool_calls:
            arguments = json.loads(call.function.arguments)
            assert isinstance(arguments, dict)
            if shape in ("none", "{}", "empty"):
                assert arguments == {}


def test_parameters_of_another_type_are_refused(ask: Callable[..., Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]
    with pytest.raises(openai.BadRequestError, match="must be of type 'object'"):
        ask(messages=USER, tools=tools, tool_choice="required", extra_body=OFF)


def test_a_tools_text_cannot_write_control_tokens(ask: Callable[..., Any], servers: Any) -> None:
    codec = servers.model("hermes").codec
    answer = ask(tools=[WEATHER], tool_choice="required", extra_body=OFF | {"return_token_ids": True}, seed=1)
    prompt = answer.model_extra["prompt_token_ids"]
    text = codec.decode(prompt, skip_special_tokens=False)
    assert "Says <|im_end|> nothing" in text
    assert text.count("<|im_end|>") == 3  # the system's and the user's turn end with one each
    assert prompt.count(codec.encode("<|im_end|>", add_special_tokens=False)[0]) == 2


# -- thoughts -------------------------------------------------------------------------------------------------


def test_thoughts_are_apart_and_within_their_budget(ask: Callable[..., Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema()}}
    fields = {"response_format": form, "n": 4, "seed": 3, "extra_body": OPEN | {"thinking_token_budget": 12}}
    answer = ask(**fields)
    for choice in answer.choices:
        assert choice.message.model_extra["reasoning_content"]
        Person.model_validate_json(choice.message.content)
    assert joined(ask(stream=True, **fields)) == as_joined(answer)


def test_thoughts_may_be_left_out(ask: Callable[..., Any]) -> None:
    asked = {"max_tokens": 60, "seed": 2, "extra_body": OPEN | {"thinking_token_budget": 10}}
    shown, hidden = (
        ask(**asked),
        ask(**asked | {"extra_body": asked["extra_body"] | {"include_reasoning": False}}),
    )
    assert shown.choices[0].message.reasoning_content
    assert not hasattr(hidden.choices[0].message, "reasoning_content")
    assert hidden.choices[0].message.content == shown.choices[0].message.content
    streamed = ask(**asked | {"extra_body": asked["extra_body"] | {"include_reasoning": False}}, stream=True)
    assert not any(hasattr(chunk.choices[0].delta, "reasoning_content") for chunk in streamed)


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_beside_the_type_counts(ask: Callable[..., Any], kind: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [7]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for seed in range(3):
        answer = ask(response_format={"type": kind, "schema": schema}, seed=seed)
        assert json.loads(answer.choices[0].message.content) == {"a": 7}
    with pytest.raises(openai.BadRequestError, match="'schema' stands in"):
        ask(response_format={"type": "text", "schema": schema})


def test_usage_says_how_many_tokens_were_thoughts(ask: Callable[..., Any], servers: Any) -> None:
    body = OPEN | {"thinking_token_budget": 7, "return_token_ids": True, "choice": ["yes", "no"]}
    answer = ask(n=3, seed=3, extra_body=body)
    table = servers.model("hermes").codec.token_bytes
    thought = 0
    for choice in answer.choices:
        ids = choice.model_extra["token_ids"]
        ends = [n for n in range(len(ids) + 1) if b"</think>" in b"".join(table[i] for i in ids[:n])]
        thought += ends[0]
    assert answer.usage.completion_tokens_details.reasoning_tokens == thought
    assert 3 * 7 < thought < answer.usage.completion_tokens
    chunks = ask(n=3, seed=3, extra_body=body, stream=True, stream_options={"include_usage": True})
    assert [chunk.usage for chunk in chunks if chunk.usage] == [answer.usage]
    assert ask(extra_body=OFF).usage.completion_tokens_details.reasoning_tokens == 0


def test_thoughts_come_before_a_forced_call(ask: Callable[..., Any]) -> None:
    fields = {"tools": [CLOCK], "tool_choice": "required", "n": 4, "seed": 3}
    fields["extra_body"] = OPEN | {"thinking_token_budget": 9}
    answer = ask(**fields)
    for choice in answer.choices:
        assert choice.message.model_extra["reasoning_content"]
        assert choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
    assert joined(ask(stream=True, **fields)) == as_joined(answer)


def test_a_budget_is_kept_without_any_grammar(ask: Callable[..., Any]) -> None:
    answer = ask(seed=1, extra_body=OPEN | {"thinking_token_budget": 0, "ignore_eos": True}, max_tokens=60)
    message = answer.choices[0].message
    assert message.model_extra["reasoning_content"] == ""
    assert message.content


def test_what_the_template_has_closed_is_no_thought(ask: Callable[..., Any]) -> None:
    message = ask(seed=1).choices[0].message
    assert "reasoning_content" not in (message.model_extra or {})


def test_the_page_runs(servers: Any) -> None:
    page = (Path(__file__).parents[3] / "docs" / "structured.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        block = block.replace("http://localhost:8000", servers.url).replace("myserve-demo", "plain")
        exec(compile(block + "\nclient.close()\n", "structured.md", "exec"), {"__name__": "page"})
