"""Calls that are forced, named or strict fit their family's form and their tool's schema, streamed and whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import jsonschema_rs
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import SMALL, trained_tokenizer
from myserve.core.grammar import Grammar
from myserve.engine.token_bytes import TokenBytes
from myserve.errors import RequestError
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.lark.reader import read_lark
from myserve.server.parsing.thinking import THOUGHT_MARKS
from myserve.server.parsing.tool_styles import STYLES, Elements, ToolStyle
from myserve.server.prompts.call_grammars import calls_in_text, forced_calls, rules_of_calls, why_no_form
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder
from myserve.wire.structured import Function, Tool

# Special in some families and plain in others: here all of them are special, which asks more.
MARKS = [
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    "<｜tool▁calls▁end｜>",
    *("[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|tool_call>", "<tool_call|>", '<|"|>', "｜DSML｜"),
    *("<start_function_call>", "<end_function_call>", "<escape>", "<minimax:tool_call>", "</minimax:tool_call>"),
    *("<seed:tool_call>", "</seed:tool_call>", "<think>", "</think>", "[THINK]", "[/THINK]"),
    *("<seed:think>", "</seed:think>", "<|channel>", "<channel|>"),
    *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"),
]  # fmt: skip
WRITE = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "lines": {"type": "integer", "minimum": 0, "maximum": 99},
        "mode": {"enum": ["keep", "replace"]},
        "force": {"type": "boolean"},
        "at": {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9}}, "required": ["x"],
               "additionalProperties": False},
    },
    "required": ["path", "mode", "at"],
    "additionalProperties": False,
}  # fmt: skip
COUNT = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "kind": {"enum": ["a", "b"]}},
    "required": ["n"],
    "additionalProperties": False,
}
SCHEMAS = {"write": WRITE, "look": {"type": "object", "properties": {}}, "count": COUNT}
# A text of any length ends at words there, which random weights do not come upon, and no ending is found.
ENDLESS = {"deepseek_v3_2", "minimax_m2", "seed_oss", "qwen3_xml"}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
USER = [{"role": "user", "content": "Hello"}]
EACH = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def template_of(style: ToolStyle) -> str:
    """A chat template that has a family's signs, none of which it writes."""
    return "{% if 0 %}" + " ".join(style.signs) + "{% endif %}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def families(
    open_server: Callable[[Settings], AbstractContextManager[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """One model whose tokenizer has every family's marks; each request brings the template of one."""
    folder = tmp_path_factory.mktemp("families")
    trained_tokenizer().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *MARKS]})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", **SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = Settings(models={"tiny": str(folder)}, trust_request_chat_template=True)
    with open_server(settings) as running:
        yield running


def chat(server: Any, style: ToolStyle, **fields: Any) -> Any:
    asked = {"model": "tiny", "messages": USER, "tools": TOOLS, "max_tokens": 300, "seed": 3} | fields
    asked["chat_template"] = template_of(style)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()["choices"][0]
    return [event.json() for event in SSEDecoder().feed(answer.content) if event.data != "[DONE]"]


def checked_calls(message: Any) -> list[tuple[str, Any]]:
    calls = []
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        jsonschema_rs.validate(SCHEMAS[call["function"]["name"]], arguments)
        calls.append((call["function"]["name"], arguments))
    return calls


@EACH
def test_required_calls_are_calls_whole_and_streamed(families: Any, style: ToolStyle) -> None:
    tools = [tool for tool in TOOLS if tool["function"]["name"] != "write" or style.name not in ENDLESS]
    asked = {"tool_choice": "required", "parallel_tool_calls": False, "tools": tools}
    choice = chat(families, style, **asked)
    assert choice["finish_reason"] == "tool_calls" and not choice["message"]["content"]
    whole = checked_calls(choice["message"])
    assert whole
    streamed: list[Any] = []
    for chunk in chat(families, style, stream=True, **asked):
        delta = chunk["choices"][0]["delta"]
        assert not delta.get("content")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                streamed.append([piece["function"]["name"], ""])
            streamed[-1][1] += piece["function"]["arguments"]
    assert [(name, json.loads(arguments)) for name, arguments in streamed] == whole


@EACH
@pytest.mark.parametrize("name", ["look", "count"])
def test_a_named_call_is_that_one(families: Any, style: ToolStyle, name: str) -> None:
    choice = chat(families, style, tool_choice={"type": "function", "function": {"name": name}}, seed=8)
    assert [called for called, _ in checked_calls(choice["message"])] == [name]


BEGUN = {name: re.match("|".join(map(re.escape, MARKS)), s.opening or s.begin) for name, s in STYLES.items()}
BY_A_TOKEN = {name: match[0] for name, match in BEGUN.items() if match is not None and not STYLES[name].lead}


@pytest.mark.parametrize(("name", "mark"), BY_A_TOKEN.items())
def test_a_strict_tool_that_is_called_by_itself_fits_its_schema(families: Any, name: str, mark: str) -> None:
    """Text may come first; what begins like a call, as the model likes to here, goes on as one."""
    strict = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS[1:]]
    bias = {str(families.model("tiny").engine.tokenizer.convert_tokens_to_ids(mark)): 6}
    asked = {"tools": strict, "parallel_tool_calls": False, "logit_bias": bias, "max_tokens": 500}
    choice = chat(families, STYLES[name], **asked)
    assert len(checked_calls(choice["message"])) == 1


def call_of(style: ToolStyle, name: str, arguments: dict[str, Any]) -> str:
    """A call as its family writes it."""
    if style.arguments is None:
        written = json.dumps(arguments)
    elif isinstance(style.arguments, Elements):
        form = style.arguments
        shown = {
            k: (v if isinstance(v, str) else json.dumps(v), isinstance(v, str)) for k, v in arguments.items()
        }
        written = "".join(
            form.open.replace("KEY", key).replace("KIND", "true" if is_text else "false") + text + form.close
            for key, (text, is_text) in shown.items()
        )
    else:
        mark = style.arguments.mark
        fields = (
            f"{k}:{mark + v + mark if isinstance(v, str) else json.dumps(v)}" for k, v in arguments.items()
        )
        written = "{" + ",".join(fields) + "}"
    return style.opening + style.bracket + style.header(name) + written + style.footer + style.closing


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Compiler]:
    folder = tmp_path_factory.mktemp("marks")
    trained_tokenizer().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *MARKS]})
    table = TokenBytes(tokenizer, len(tokenizer))
    known = Vocabulary(list(table), table.special_ids, (tokenizer.eos_token_id,))
    return tokenizer, Compiler(known, lambda text: list(tokenizer.encode(text, add_special_tokens=False)))


GOOD = {"path": "a\n<b", "lines": 7, "mode": "keep", "at": {"x": 3}}
BAD = [
    GOOD | {"mode": "kept"},
    GOOD | {"lines": 100},
    GOOD | {"at": {"x": 3, "y": 4}},
    {"lines": 7, "mode": "keep", "at": {"x": 3}},
    GOOD | {"other": 1},
]


@EACH
@pytest.mark.parametrize("marks", ["special", "plain"])
def test_a_grammar_takes_what_fits_the_schema_and_nothing_else(
    vocabulary: tuple[Any, Compiler], style: ToolStyle, marks: str
) -> None:
    tokenizer, compiler = vocabulary
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if marks == "special":
        style = style.of(special)
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    source = f"start: {forced_calls(style, one=False)}\n{rules_of_calls(tools, style)}"
    grammar = compiler.compile(Grammar("lark", source))

    def ids(text: str) -> list[int]:
        # where marks are plain, so are their tokens
        split = marks == "plain"
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split))

    for name, arguments in (
        ("write", GOOD),
        ("look", {}),
        ("count", {"n": 5}),
        ("count", {"n": 5, "kind": "b"}),
    ):
        matcher = grammar.deep_copy()
        assert matcher.consume_tokens(ids(call_of(style, name, arguments))), (name, matcher.get_error())
        assert matcher.is_accepting()
    for arguments in BAD:
        matcher = grammar.deep_copy()
        taken = matcher.consume_tokens(ids(call_of(style, "write", arguments)))
        assert not (taken and matcher.is_accepting()), arguments


HUNKS = 'start: "begin" LF ("+" /(.*)/ LF)+ "end"\n%import common.LF'
SUMS = 'start: sum\nsum: sum "+" part | part\npart: "(" sum ")" | /[0-9"]/\n%ignore /[ \\n]/'
SAID = {
    HUNKS: {'begin\n+a "b" \\n\n+\nend': True, "begin\nend": False, "begin\n+a\nend\n": False},
    SUMS: {'(1+") + \n(2)': True, "(1+2": False, "": False},
}


@EACH
@pytest.mark.parametrize("marks", ["special", "plain"])
@pytest.mark.parametrize("source", SAID, ids=["regular", "recursive"])
def test_a_text_s_own_grammar_holds_in_every_style(
    vocabulary: tuple[Any, Compiler], style: ToolStyle, marks: str, source: str
) -> None:
    tokenizer, compiler = vocabulary
    if marks == "special":
        style = style.of(
            {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        )
    tool = {"name": "say", "parameters": {"type": "object", "properties": {"input": {"type": "string"}}}}
    tools = [Tool.model_validate({"type": "function", "function": tool}), Tool.model_validate(TOOLS[2])]
    form = read_lark(source)
    ends = [getattr(style.arguments, name, "") for name in ("close", "mark")]
    is_plain = any(ends) and not any(end.startswith(mark) for mark in style.special for end in ends)
    reason = why_no_form(form, style)
    assert (reason is not None) == (source == SUMS and is_plain)
    if reason is not None:
        return
    rules = rules_of_calls(tools, style, forms={"say": form})
    grammar = compiler.compile(Grammar("lark", f"start: {forced_calls(style, one=True)}\n{rules}"))

    def is_taken(call: str) -> bool:
        ids = tokenizer.encode(call, add_special_tokens=False, split_special_tokens=marks == "plain")
        matcher = grammar.deep_copy()
        return bool(matcher.consume_tokens(list(ids)) and matcher.is_accepting())

    for said, fits in SAID[source].items():
        assert is_taken(call_of(style, "say", {"input": said})) == fits, said
    assert is_taken(call_of(style, "count", {"n": 5}))  # beside it a tool of another kind


IN_CHANNELS = {
    "<|channel|>final<|message|>a < b": True,
    "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>final<|message|>Yes.": True,
    '<|channel|>commentary to=functions.count <|constrain|>json<|message|>{"n": 5}': True,
    '<|channel|>commentary to=functions.count <|constrain|>json<|message|>{"n": "x"}': False,
    '<|channel|>final<|message|>x<|channel|>commentary to=functions.count <|constrain|>json<|message|>{"n": 5}': False,
}


@pytest.mark.parametrize(("text", "fits"), IN_CHANNELS.items())
def test_in_channels_text_and_strict_calls_are_told_apart(
    vocabulary: tuple[Any, Compiler], text: str, fits: bool
) -> None:
    tokenizer, compiler = vocabulary
    style = STYLES["harmony"].of({str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special})
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    matcher = compiler.compile(Grammar("lark", calls_in_text(tools, style, one=False)))
    taken = matcher.consume_tokens(list(tokenizer.encode(text, add_special_tokens=False)))
    assert (taken and matcher.is_accepting()) == fits


def test_parameters_that_are_not_listed_cannot_be_kept_to() -> None:
    tool = Tool(type="function", function=Function(name="f", parameters={"anyOf": [{"type": "object"}]}))
    with pytest.raises(RequestError, match="parameter by parameter"):
        rules_of_calls([tool], STYLES["qwen3_xml"])


@pytest.mark.parametrize("marks", THOUGHT_MARKS, ids=[start for start, _ in THOUGHT_MARKS])
def test_every_family_s_thoughts_are_read_and_bounded(families: Any, marks: tuple[str, str]) -> None:
    start, end = marks
    template = "{% if 0 %}" + end + "{% endif %}{{ messages[0].content }}" + start
    asked = {"model": "tiny", "messages": USER, "max_tokens": 60, "seed": 3, "chat_template": template}
    asked |= {
        "thinking_token_budget": 3,
        "return_token_ids": True,
        "response_format": {"type": "json_object"},
    }
    answer = httpx.post(f"{families.url}/v1/chat/completions", json=asked, timeout=60).json()
    choice = answer["choices"][0]
    tokenizer = families.model("tiny").engine.tokenizer
    closed = tokenizer.convert_tokens_to_ids(end)
    assert choice["token_ids"][3] == closed
    thought = tokenizer.decode(choice["token_ids"][:3], skip_special_tokens=True)
    assert choice["message"]["reasoning_content"] == thought.strip("\n")
    assert end not in choice["message"]["content"] and choice["message"]["content"].startswith("{")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4
