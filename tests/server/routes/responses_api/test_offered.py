"""A custom tool's grammar holds its call's text, in JSON and as it is; or it is told to have no effect, or refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.server.settings import Settings

HUNKS = """
start: begin hunk{1,3} end
begin: "*** Begin" LF
hunk: "-" /["a-f\\\\]{1,6}/ LF | "+" /(.){0,3}/ LF
end: "*** End"
%import common.LF
"""
HUNKS_IN_PYTHON = r'\*\*\* Begin\n(?:-["a-f\\]{1,6}\n|\+.{0,3}\n){1,3}\*\*\* End'
NESTED = 'start: "(" NAME? start? ")"\nNAME: /["\\n]/'
XML_TEMPLATE = (
    "{% if tools %}<tool_call>\n<function=NAME>\n<parameter=KEY>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def custom(name: str, definition: str | None, syntax: str | None = "lark") -> dict[str, Any]:
    form = {"type": "grammar", "syntax": syntax, "definition": definition}
    return {"type": "custom", "name": name, "format": form if syntax is not None else {"type": "text"}}


@pytest.fixture(scope="module")
def xml_server(
    open_server: Callable[[Settings], AbstractContextManager[Any]],
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A model that writes a parameter's text as it is, between marks of plain tokens."""
    folder = tmp_path_factory.mktemp("xml") / "model"
    shutil.copytree(tiny_model("qwen3"), folder)
    (folder / "chat_template.jinja").write_text(XML_TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    with open_server(Settings(models={"agent": str(folder)})) as running:
        yield running


def ask(server: Any, **fields: Any) -> httpx.Response:
    asked = {"model": "agent", "input": "Go on", "max_output_tokens": 200, "parallel_tool_calls": False}
    return httpx.post(server.url + "/v1/responses", json=asked | fields, timeout=60)


def inputs(server: Any, tool: dict[str, Any], seeds: range = range(6)) -> list[str]:
    """The texts of a forced call, one for each seed; none of them with a warning."""
    found = []
    for seed in seeds:
        answer = ask(server, tools=[tool], tool_choice={"type": "custom", "name": tool["name"]}, seed=seed)
        assert answer.status_code == 200, answer.text
        assert answer.json()["warnings"] == []
        (call,) = answer.json()["output"]
        assert call["type"] == "custom_tool_call"
        found.append(call["input"])
    return found


SERVERS = pytest.mark.parametrize("name", ["agent_server", "xml_server"])


@SERVERS
def test_a_forced_call_s_text_is_one_of_its_grammar(request: pytest.FixtureRequest, name: str) -> None:
    server = request.getfixturevalue(name)
    texts = inputs(server, custom("patch", HUNKS))
    assert all(re.fullmatch(HUNKS_IN_PYTHON, text) for text in texts), texts
    assert len(set(texts)) > 1 and any('"' in text for text in texts)


@SERVERS
def test_a_regex_holds_too(request: pytest.FixtureRequest, name: str) -> None:
    texts = inputs(request.getfixturevalue(name), custom("shell", r'^ls ["a-z]{3}\n$', "regex"), range(3))
    assert all(re.fullmatch(r'ls ["a-z]{3}\n', text) for text in texts), texts


@SERVERS
def test_control_without_a_grammar_the_text_is_another(request: pytest.FixtureRequest, name: str) -> None:
    tool = custom("patch", None, None)
    for seed in range(2):
        choice = {"type": "custom", "name": "patch"}
        answer = ask(request.getfixturevalue(name), tools=[tool], tool_choice=choice, seed=seed).json()
        (item,) = answer["output"]  # in XML a text without a grammar does not come to its end here
        said = item["input"] if item["type"] == "custom_tool_call" else item["content"][0]["text"]
        assert len(said) > 20 and re.search(HUNKS_IN_PYTHON, said) is None


def test_rules_that_recur_hold_in_json(agent_server: Any) -> None:
    texts = inputs(agent_server, custom("nest", NESTED))
    for text in texts:
        bare = re.sub(r'["\n]', "", text)
        assert bare == "(" * (len(bare) // 2) + ")" * (len(bare) // 2), text
    assert any('"' in text or "\n" in text for text in texts)


def test_several_tools_grammars_stand_side_by_side(agent_server: Any) -> None:
    tools = [custom("patch", HUNKS), custom("nest", NESTED), custom("digits", "start: A+\nA: /[0-9]/ ")]
    called = set()
    for seed in range(8):
        (call,) = ask(agent_server, tools=tools, tool_choice="required", seed=seed).json()["output"]
        pattern = {"patch": HUNKS_IN_PYTHON, "nest": r'["()\n]+', "digits": "[0-9]+"}[call["name"]]
        assert re.fullmatch(pattern, call["input"]), call
        called.add(call["name"])
    assert len(called) > 1


# ---- no effect, and no grammar

WITHOUT_EFFECT = {
    "what is llguidance's own": ('start: %json {"type": "integer"}', "lark", "line 1"),
    "lazy": ("start: /a*?b/", "lark", "lazy"),
    "GBNF": ('root ::= "a" | "b"', "lark", "line 1"),
    "none": (None, "lark", "definition"),
}


@pytest.mark.parametrize(("definition", "syntax", "words"), WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_a_grammar_without_effect_is_told(
    agent_server: Any, definition: str | None, syntax: str, words: str
) -> None:
    answer = ask(agent_server, tools=[custom("t", definition, syntax)], max_output_tokens=4).json()
    (word,) = answer["warnings"]
    assert word.startswith("tools: the grammar of 't' has no effect: ") and words in word


def test_rules_that_recur_are_told_where_a_text_stands_as_it_is(xml_server: Any) -> None:
    (word,) = ask(xml_server, tools=[custom("t", NESTED)], max_output_tokens=4).json()["warnings"]
    assert "has no effect: rules that recur" in word and "</parameter>" in word


REFUSED = {
    "no Lark": ("what is this", "line 1"),
    "an undefined rule": ("start: other", "unknown name"),
    "look-around": ("start: /a(?=b)/", "look-around"),
    "an unknown terminal": ("start: A\n%import common.A", "common"),
}


@pytest.mark.parametrize(("definition", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_what_is_no_grammar_is_refused_by_its_place(
    agent_server: Any, definition: str, words: str, choice: str
) -> None:
    answer = ask(agent_server, tools=[custom("a", HUNKS), custom("b", definition)], tool_choice=choice)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "tools[1].format.definition"
    assert words in error["message"] and "tools[1].format.definition" in error["message"]


def test_in_a_namespace_the_place_is_named_too(agent_server: Any) -> None:
    group = {"type": "namespace", "name": "n", "description": "", "tools": [custom("b", "start: b")]}
    answer = ask(agent_server, tools=[group])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools[0].tools[0].format.definition"
