"""Structural tags admit the texts that they describe and no other; what is no such thing is refused with the reason."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from myserve.errors import RequestError
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.server.prompts.structural_tag import structural_tag

EOS = 256
COMPILER = Compiler(
    Vocabulary([*(bytes([byte]) for byte in range(256)), b"<eos>"], frozenset({EOS}), (EOS,)),
    lambda text: list(text.encode()),
)
CITY = {
    "type": "object",
    "properties": {"c": {"type": "string"}},
    "required": ["c"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": CITY}
CALL = {"begin": "<f=a>", "content": JSON, "end": "</f>"}
NOTE = {"begin": "<f=b>", "content": {"type": "any_text"}, "end": "</f>"}
CALLED, NOTED = '<f=a>{"c":"x"}</f>', "<f=b>any < text</f>"
TRIGGERED = {"type": "triggered_tags", "triggers": ["<f=", "["], "tags": [CALL, NOTE]}
A: dict[str, Any] = {"type": "const_string", "value": "a"}
TAGS = {
    "type": "tags_with_separator",
    "separator": "\n",
    "tags": [CALL, {"begin": "<n>", "content": A, "end": ["!", "?"]}],
}


def admits(form: Any, text: str) -> bool:
    matcher = COMPILER.compile(structural_tag(form)).deep_copy()
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("form", "texts", "others"),
    [
        (A, ["a"], ["", "aa"]),
        (JSON, ['{"c":"x"}'], ["{}"]),
        ({"type": "regex", "pattern": "[0-9]/\\d"}, ["1/2"], ["12"]),
        ({"type": "optional", "content": A}, ["", "a"], ["aa"]),
        ({"type": "star", "content": A}, ["", "aaa"], ["b"]),
        ({"type": "plus", "content": A}, ["a", "aa"], [""]),
        ({"type": "or", "elements": [A, JSON]}, ["a", '{"c":"x"}'], [""]),
        (
            {"type": "sequence", "elements": [NOTE | {"type": "tag"}, {"type": "any_text"}]},
            [NOTED, NOTED + "!"],
            ["!", "<f=b>never closed"],
        ),
        (TRIGGERED, ["", "free <f", f"a {CALLED} b {NOTED}", CALLED + CALLED], ["<f=c>", "<f=a>x</f>", "<f=b>open"]),
        (TRIGGERED | {"at_least_one": True}, [CALLED, f"a{CALLED}b"], ["", "a"]),
        (TRIGGERED | {"stop_after_first": True}, ["a", f"a{CALLED}"], [f"{CALLED}b", CALLED + CALLED]),
        (TRIGGERED | {"stop_after_first": True, "at_least_one": True}, [f"a{CALLED}"], ["a", f"{CALLED}b"]),
        (TAGS, ["", CALLED, f"{CALLED}\n<n>a?", "<n>a!"], [f"{CALLED}{CALLED}", "a", f"{CALLED}\n"]),
        (TAGS | {"at_least_one": True, "stop_after_first": True}, [CALLED], ["", f"{CALLED}\n{CALLED}"]),
    ],
)  # fmt: skip
def test_what_each_form_admits(form: dict[str, Any], texts: list[str], others: list[str]) -> None:
    whole = {"type": "structural_tag", "format": form}
    assert [text for text in texts if not admits(whole, text)] == []
    assert [text for text in others if admits(whole, text)] == []


def test_the_older_form_is_triggered_tags() -> None:
    older = {"structures": [{"begin": "<f=a>", "schema": CITY, "end": "</f>"}], "triggers": ["<f="]}
    assert admits(older, f"a {CALLED} b")
    assert not admits(older, "<f=b>")


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("{", "not valid JSON"),
        ({}, "'format' is missing"),
        ({"format": {"type": "token"}}, "'token' is not supported; these are: const_string"),
        ({"format": TRIGGERED | {"excludes": ["x"]}}, "'excludes'"),
        ({"format": TRIGGERED | {"triggers": ["<g="]}}, "begins with none of the triggers"),
        (
            {"format": {"type": "sequence", "elements": []}},
            "'elements' of a structural tag must not be empty",
        ),
        ({"format": {"type": "sequence", "elements": [TRIGGERED, A]}}, "at the end of all"),
        ({"format": {"type": "sequence", "elements": [{"type": "any_text"}, A]}}, "any_text may stand"),
        ({"format": CALL | {"type": "tag", "end": 5}}, "the 'end' of a tag"),
        (
            {"format": {"type": "tag", "begin": "<", "content": "a"}},
            "'content' is missing or of another type",
        ),
    ],
)
def test_a_refusal_says_why(form: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        structural_tag(form)


def test_deep_nesting_is_refused() -> None:
    form: dict[str, Any] = A
    for _ in range(5000):
        form = {"type": "optional", "content": form}
    with pytest.raises(RequestError, match="too deeply"):
        structural_tag({"format": form})


@pytest.mark.parametrize("field", ["structured_outputs", "response_format"])
def test_a_random_model_keeps_to_it(server: Any, field: str) -> None:
    form = {
        "type": "tag",
        "begin": "<n>",
        "content": {"type": "regex", "pattern": "[0-9]{1,3}"},
        "end": "</n>",
    }
    tag = {"type": "structural_tag", "format": form}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "n": 4,
        "seed": 1,
        "max_tokens": 40,
    }
    body[field] = tag if field == "response_format" else {"structural_tag": tag}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        text = choice["message"]["content"]
        assert text[:3] == "<n>" and text[-4:] == "</n>" and text[3:-4].isdigit()
