"""Every family's calls, as its models write them, are found in every cut, and nothing else is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call_pieces import read_calls
from myserve.server.parsing.channels import ChannelReader
from myserve.server.parsing.tool_styles import STYLES, ToolStyle, style_of

WRITE = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "text": {"type": "string"},
        "lines": {"type": "integer"},
        "force": {"type": ["boolean", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["path", "text"],
}
TOOLS: dict[str, Any] = {"write": WRITE, "look": None}


def read(style: ToolStyle, parts: list[str], tools: Any = TOOLS) -> list[Any]:
    return read_calls(style, tools, parts)


# As families' templates write two calls in an earlier turn: one with a line of code, one without arguments.
CODE = "if a < b:\n    print('</x>')\n"
ARGUMENTS = {"path": "a.py", "text": CODE, "lines": 2, "force": True, "tags": ["x", "ü"]}
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "write", "arguments": %s}\n</tool_call>\n<tool_call>\n{"name": "look", '
    '"arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "write", "parameters": %s}; {"name": "look", "parameters": {}}',
    "granite": '<|tool_call|>[{"name": "write", "arguments": %s}, {"name": "look", "arguments": {}}]',
    "mistral_v3": '[TOOL_CALLS] [{"name": "write", "arguments": %s, "id": "123456789"}, '
    '{"name": "look", "arguments": {}, "id": "abcdefghi"}]',
    "mistral": "[TOOL_CALLS]write[ARGS]%s[TOOL_CALLS]look[CALL_ID]abcdefghi[ARGS]{}",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>write\n```json\n%s\n```"
    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "deepseek_v3_1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write<｜tool▁sep｜>%s<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>look<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v3_2": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="write">\n'
    '<｜DSML｜parameter name="path" string="true">a.py</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="text" string="true">%s</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="lines" string="false">2</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="force" string="false">true</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="tags" string="false">["x", "ü"]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="look">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="write">\n<parameter name="path">a.py</parameter>\n'
    '<parameter name="text">%s</parameter>\n<parameter name="lines">2</parameter>\n'
    '<parameter name="force">true</parameter>\n<parameter name="tags">["x", "ü"]</parameter>\n</invoke>\n'
    '<invoke name="look">\n</invoke>\n</minimax:tool_call>',
    "harmony": "<|channel|>commentary to=functions.write <|constrain|>json<|message|>%s"
    "<|channel|>commentary to=functions.look<|message|>{}",
    "seed_oss": "<seed:tool_call>\n<function=write>\n<parameter=path>a.py</parameter>\n<parameter=text>%s</parameter>\n"
    '<parameter=lines>2</parameter>\n<parameter=force>true</parameter>\n<parameter=tags>["x", "ü"]</parameter>\n'
    "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=look>\n</function>\n</seed:tool_call>",
    "qwen3_xml": "<tool_call>\n<function=write>\n<parameter=path>\na.py\n</parameter>\n"
    "<parameter=text>\n%s\n</parameter>\n"
    '<parameter=lines>\n2\n</parameter>\n<parameter=force>\nTrue\n</parameter>\n<parameter=tags>\n["x", "ü"]\n'
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=look>\n</function>\n</tool_call>",
    "glm": "<tool_call>write\n<arg_key>path</arg_key>\n<arg_value>a.py</arg_value>\n<arg_key>text</arg_key>\n"
    "<arg_value>%s</arg_value>\n<arg_key>lines</arg_key>\n<arg_value>2</arg_value>\n<arg_key>force</arg_key>\n"
    '<arg_value>true</arg_value>\n<arg_key>tags</arg_key>\n<arg_value>["x", "ü"]</arg_value>\n</tool_call>\n'
    "<tool_call>look\n</tool_call>",
    "glm_4_7": "<tool_call>write<arg_key>path</arg_key><arg_value>a.py</arg_value><arg_key>text</arg_key>"
    "<arg_value>%s</arg_value><arg_key>lines</arg_key><arg_value>2</arg_value><arg_key>force</arg_key>"
    '<arg_value>true</arg_value><arg_key>tags</arg_key><arg_value>["x", "ü"]</arg_value></tool_call>'
    "<tool_call>look</tool_call>",
    "gemma4": '<|tool_call>call:write{force:true,lines:2,path:<|"|>a.py<|"|>,tags:[<|"|>x<|"|>,<|"|>ü<|"|>],'
    'text:<|"|>%s<|"|>}<tool_call|><|tool_call>call:look{}<tool_call|>',
    "function_gemma": "<start_function_call>call:write{force:true,lines:2,path:<escape>a.py<escape>,"
    "tags:[<escape>x<escape>,<escape>ü<escape>],text:<escape>%s<escape>}<end_function_call>"
    "<start_function_call>call:look{}<end_function_call>",
}


def written(style: ToolStyle) -> str:
    as_json = style.arguments is None
    return WRITTEN[style.name].replace("%s", json.dumps(ARGUMENTS, ensure_ascii=False) if as_json else CODE)


EACH = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


@EACH
def test_calls_of_earlier_turns_are_read_in_every_cut(style: ToolStyle) -> None:
    text = written(style)
    (first, arguments), second = read(style, [text])
    assert first == "write" and json.loads(arguments) == ARGUMENTS and second == ("look", "{}")
    if style.name != "llama3_json":
        text = f"Let me see. \n{text}\n"
    whole = read(style, [text])
    assert whole[-2:] == [("write", arguments), ("look", "{}")]
    assert whole[:-2] in ([], ["Let me see."])
    assert read(style, list(text)) == whole
    for cut in range(0, len(text), 5):
        assert read(style, [text[:cut], text[cut : cut + 3], text[cut + 3 :]]) == whole, cut


@EACH
def test_another_tool_s_call_and_a_broken_one_stay_text(style: ToolStyle) -> None:
    text = written(style)
    for broken in (
        text.replace("write", "wrote").replace("look", "loop"),
        text.replace("write", "").replace("look", ""),
    ):
        assert "".join(read(style, list(broken))) == broken
        assert "".join(read(style, [broken])) == broken


@EACH
def test_a_call_that_is_cut_is_a_call_so_far_or_text(style: ToolStyle) -> None:
    """Where arguments come as they are written, they end where the text does."""
    text = written(style)
    for end in range(0, len(text), 3):
        cut = text[:end]
        parts = read(style, [cut[:-9], cut[-9:-2], cut[-2:]])
        kept = "".join(part if isinstance(part, str) else part[1] for part in parts)
        if any(isinstance(part, tuple) for part in parts):
            assert parts[0][0] == "write"
        else:
            # but white space before a mark that never came
            assert kept == cut or kept == cut.rstrip(), cut


def fuzzed_pieces(style: ToolStyle) -> list[str]:
    marks = [style.opening, style.begin, style.head, style.tail, style.end, style.closing, style.between]
    halves = [
        part for mark in marks if mark for part in (mark, mark[: len(mark) // 2], mark[len(mark) // 2 :])
    ]
    return [
        *halves,
        "write",
        "loo",
        "k ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\n",
        " ",
        ",",
        "x",
        "<",
        "<arg_key>",
        "</",
    ]


@EACH
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_text_without_a_call_is_never_lost(style: ToolStyle, data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from(fuzzed_pieces(style)), max_size=14))
    text = "".join(parts)
    assert "".join(read(style, parts, {"no such tool": None})) == text
    assert read(style, parts) == read(style, [text]) == read(style, list(text))


TEMPLATES = {
    "hermes": "{% if tools %}<tools></tools> in <tool_call></tool_call>{% endif %}",
    "qwen3_xml": "{% if tools %}<tool_call>\n<function=example>\n<parameter=a>{% endif %}",
    "glm": "{% if tools %}<tool_call>{name}\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>{% endif %}",
    "glm_4_7": "{% if tools %}<tool_call>{name}<arg_key>{k}</arg_key><arg_value>{v}</arg_value>{% endif %}",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ type }}<｜tool▁sep｜>{{ name }}\n```json\n",
    "deepseek_v3_1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>{{ arguments }}",
    "mistral": "[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]{{ name }}[ARGS]",
    "mistral_v3": "[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS] [",
    "granite": "{% if tools %}<|tool_call|>{% endif %}",
    "gemma4": "<|tool>{{ tools }}<tool|><|tool_call>call:{{ name }}<tool_call|>",
    "function_gemma": "<start_function_declaration>{{ tools }}<start_function_call>call:",
    "minimax_m2": "{{ tools }}<minimax:tool_call>\n<invoke name=",
    "seed_oss": "{{ tools }}<seed:tool_call>\n<function=",
    "harmony": "{{ tools }}namespace functions<|start|>assistant<|channel|>commentary<|message|>",
    "llama3_json": '{% if tools %}{"name": n, "parameters": {}}{% endif %}',
}


@pytest.mark.parametrize(("name", "template"), TEMPLATES.items())
def test_a_template_shows_its_family(name: str, template: str) -> None:
    found = style_of(template)
    assert found is not None and found.name == name


CHANNELS = [
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "Hm.",
        ["Yes."],
    ),
    ("<|channel|>final<|message|>Yes. a < b", "", ["Yes. a < b"]),
    ("no channel <|", "", ["no channel <|"]),
    ("<|channel|>final", "", ["<|channel|>final"]),
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}",
        "Hm.",
        ["Wait.", ("look", "{}")],
    ),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b", "ab", []),
    (" to=functions.look<|channel|>commentary json<|message|>{}", "", [("look", "{}")]),
]


@pytest.mark.parametrize(("text", "thought", "expected"), CHANNELS)
def test_channels_are_told_apart_in_every_cut(text: str, thought: str, expected: list[Any]) -> None:
    for parts in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        reader = ChannelReader()
        seen = [*(reader.feed(part) for part in parts), reader.end()]
        assert "".join(thought for thought, _ in seen) == thought
        assert read(STYLES["harmony"], [said for _, said in seen]) == expected


def test_a_template_without_tools_shows_none() -> None:
    assert style_of("{{ messages }}") is None
