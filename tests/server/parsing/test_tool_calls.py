"""Calls are found however the text is cut, and every character that is not a call's stays content."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call_pieces import read_calls
from myserve.server.parsing.thinking import ThinkingCount, ThinkingReader
from myserve.server.parsing.tool_calls import Arguments, CallReader, CallStart
from myserve.server.parsing.tool_styles import HERMES, LLAMA3_JSON, ToolStyle

NAMES = {"f", "get_weather"}
F = '<tool_call>\n{"name": "f", "arguments": {"a": "} \\" {"}}\n</tool_call>'
F_ARGUMENTS = '{"a": "} \\" {"}'
L = '{"name": "f", "parameters": {"a": "} \\" {"}}'

CASES: list[tuple[ToolStyle, str, list[object]]] = [
    (HERMES, "plain text, a < b <tool", ["plain text, a < b <tool"]),
    (HERMES, F, [("f", F_ARGUMENTS)]),
    (HERMES, f"\n\n{F}\n", [("f", F_ARGUMENTS)]),
    (HERMES, f"Let me look. \n{F}", ["Let me look.", ("f", F_ARGUMENTS)]),
    (HERMES, f"{F}\n{F}", [("f", F_ARGUMENTS), ("f", F_ARGUMENTS)]),
    (HERMES, f"{F}\n\nDone. ", [("f", F_ARGUMENTS), "\n\nDone. "]),
    (HERMES, F.removesuffix("\n</tool_call>"), [("f", F_ARGUMENTS)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": [1, ', [("f", '{"a": [1, ')]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}}</tool_call>!', ["<same>"]),
    (HERMES, "a<tool_call>not JSON</tool_call>b", ["<same>"]),
    (HERMES, "a<tool_call>never closed", ["<same>"]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}} and more', [("f", "{}"), " and more"]),
    (LLAMA3_JSON, L, [("f", F_ARGUMENTS)]),
    (LLAMA3_JSON, f" {L}; {L}\n", [("f", F_ARGUMENTS), ("f", F_ARGUMENTS)]),
    (LLAMA3_JSON, '{"type": "function", "name": "f", "parameters": {}}', [("f", "{}")]),
    (LLAMA3_JSON, f"Well, {L}", ["<same>"]),
    (LLAMA3_JSON, '{"answer": {"name": "f"}}', ["<same>"]),
    (LLAMA3_JSON, '{"name": "Ann", "parameters": {}}', ["<same>"]),
    (LLAMA3_JSON, "", []),
    (LLAMA3_JSON, f"{L} so", [("f", F_ARGUMENTS), " so"]),
]


def read(style: ToolStyle, parts: list[str]) -> list[object]:
    return read_calls(style, NAMES, parts)


@pytest.mark.parametrize(("style", "text", "expected"), CASES)
def test_whole_and_in_every_cut(style: ToolStyle, text: str, expected: list[object]) -> None:
    expected = [text] if expected == ["<same>"] else expected
    assert read(style, [text]) == expected
    assert read(style, list(text)) == expected
    for cut in range(len(text)):
        assert read(style, [text[:cut], text[cut:]]) == expected


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*'<tol_ca>/{}":, nmef\n;', "<tool_call>", "</tool_call>", '{"name": "f", "']))
)
def test_text_without_arguments_is_never_lost(parts: list[str]) -> None:
    text = "".join(parts)
    for style in (HERMES, LLAMA3_JSON):
        assert read(style, parts) == ([text] if text else [])


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(HERMES, NAMES)
    reader.feed('<tool_call>\n{"name": "f", "arguments": ')
    assert [reader.feed(c) for c in '{"a"'] == [
        [CallStart("f"), Arguments("{")],
        *([Arguments(c)] for c in '"a"'),
    ]


THOUGHTS = [
    (False, "<think>\nHm.\n</think>\n\nYes", "Hm.", "Yes"),
    (False, "  <think>Hm.</think>Yes\n", "Hm.", "Yes\n"),
    (False, "Yes <think>no</think>", "", "Yes <think>no</think>"),
    (False, "<thin", "", "<thin"),
    (True, "\nHm.\n\n</think>\n", "Hm.", ""),
    (True, "Hm.\n", "Hm.", ""),
    (True, "a\n\nb </thinking></think>c", "a\n\nb </thinking>", "c"),
    (False, "", "", ""),
]


@pytest.mark.parametrize(("begun", "text", "thought", "answer"), THOUGHTS)
def test_thoughts_in_every_cut(begun: bool, text: str, thought: str, answer: str) -> None:
    for parts in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        reader = ThinkingReader(starts_inside=begun)
        seen = [*(reader.feed(part) for part in parts), reader.end()]
        assert ("".join(t for t, _ in seen), "".join(a for _, a in seen)) == (thought, answer)


def tokens_of_a_thought(tokens: list[bytes], begun: bool) -> int:
    """The definition, over all of the text at each token."""
    for count in range(1, len(tokens) + 1):
        before, text = b"".join(tokens[: count - 1]), b"".join(tokens[:count])
        inside = begun or before.lstrip().startswith(b"<think>")
        if inside and b"</think>" in text[max(0, len(before) - 8) :]:
            return count
        if not inside and not b"<think>".startswith(text.lstrip()[:7]):
            return 0
    return len(tokens) if begun or b"".join(tokens).lstrip().startswith(b"<think>") else 0


PIECES = st.sampled_from(
    [b"<think>", b"</think>", b"<th", b"ink>", b"</thi", b"nk>", b"a", b"\n ", b"", b"<"]
)


@given(st.lists(PIECES, max_size=12), st.booleans())
def test_the_tokens_of_a_thought_are_counted_as_they_come(tokens: list[bytes], begun: bool) -> None:
    count = ThinkingCount(starts_inside=begun)
    for n, data in enumerate(tokens, 1):
        count.feed(data)
        assert count.tokens == tokens_of_a_thought(tokens[:n], begun)
    assert count.num_fed == len(tokens)


def test_every_header_is_one_that_the_reader_reads() -> None:
    for style in (HERMES, LLAMA3_JSON):
        text = style.header("get_weather") + json.dumps({"city": "Ulm"}) + style.footer
        assert read(style, [text + style.between + text]) == 2 * [("get_weather", '{"city": "Ulm"}')]


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": 1E5}',
        '{"a": 1e400, "b": -0}',
        '{ "a" : "\\u00e9" }',
        '{"a": 12345678901234567890123}',
        "{}",
        '{"a": "}"}',
    ],
)
@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_arguments_are_the_models_own_text_in_any_order(arguments: str, key: str) -> None:
    """Read and written anew, 1e400 would be Infinity."""
    for call in (
        f'{{"{key}": {arguments}, "name": "f"}}',
        f'{{"id": "x", "name": "f", "{key}": {arguments}}}',
        f'{{"name": "f", "{key}": {json.dumps(arguments)}}}',
        f'{{ "name" : "f" , "{key}" : {arguments} }}',
    ):
        assert read(HERMES, [f"<tool_call>{call}</tool_call>"]) == [("f", arguments)]
        assert read(HERMES, list(f"<tool_call>{call}</tool_call>")) == [("f", arguments)]


@pytest.mark.parametrize("call", ['{"name": "f"}', '{"name": "f", "arguments": null}'])
def test_a_call_without_arguments_has_an_empty_object(call: str) -> None:
    assert read(HERMES, [f"<tool_call>{call}</tool_call>"]) == [("f", "{}")]


@pytest.mark.parametrize("arguments", ["42626", "Infinity", "[1]", "true", '"x"', '{"a": NaN}', '"[1]"'])
def test_arguments_that_are_no_object_are_no_call(arguments: str) -> None:
    text = f'<tool_call>{{"arguments": {arguments}, "name": "f"}}</tool_call>'
    assert read(HERMES, [text]) == [text]
