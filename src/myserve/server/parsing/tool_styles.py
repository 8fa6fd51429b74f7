"""The forms in which families of models write tool calls: one table, and how a chat template shows which it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    "HERMES",
    "LLAMA3_JSON",
    "STYLES",
    "TOOL_STYLES",
    "Elements",
    "Quoted",
    "Region",
    "ToolStyle",
    "object_style",
    "style_of",
]


@dataclass(frozen=True, slots=True)
class Elements:
    """Arguments as elements, one for each: `open`, with KEY for its name, a value that is text or JSON, `close`.

    `read` finds one, with its groups `key` and `value`. KIND in `open` is whether the value is text.
    """

    open: str
    close: str
    read: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Quoted:
    """Arguments as an object whose names are bare and whose strings stand between two of a `mark`."""

    mark: str


@dataclass(frozen=True, slots=True)
class Region:
    """A whole call, name and arguments, as `read` finds it: a value of OpenAI's form, or a list of them."""

    read: Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """One form of calls. A call is `begin`, `head` (NAME is the function's), its arguments, `tail`, `end`.

    Without a `begin`, calls stand at the start of the answer and nowhere else; with an `opening`, between it and
    `closing`. White space at marks is the model's own: it may be there or not.
    """

    name: str
    begin: str
    end: str
    between: str  # two calls
    head: str
    tail: str = ""
    lead: str = ""  # a message's beginning, which may stand before the call; then a message is one call
    opening: str = ""
    bracket: str = ""  # behind `opening`, where calls are a list
    closing: str = ""
    signs: tuple[str, ...] = ()  # that a chat template of the family has, all of them
    read_head: re.Pattern[str] | None = None  # up to the arguments, with the group `name`; None: an object's
    arguments: Elements | Quoted | Region | None = None  # None: a JSON object
    # of the tokens that write its marks, those that are special: a text shows them only where it is told to
    special: Mapping[str, int] = field(default_factory=dict)

    def header(self, function: str) -> str:
        """Return the text of a call before its arguments, as a trained model writes it."""
        name = json.dumps(function) if self.is_object else function
        return self.begin + self.head.replace("NAME", name)

    @property
    def footer(self) -> str:
        """Return the text behind the arguments."""
        return self.tail + self.end

    @property
    def is_marked(self) -> bool:
        """Return whether a call can be told from text as it begins."""
        return bool(self.opening or self.begin)

    @property
    def is_object(self) -> bool:
        """Return whether name and arguments are fields of one JSON object, in any order."""
        return self.read_head is None and self.arguments is None

    @property
    def shown_ids(self) -> tuple[int, ...]:
        """Return the special tokens that must be in a text for its calls to be found."""
        return tuple(sorted(self.special.values()))

    @property
    def marks(self) -> str:
        """Return all text of a call that is neither name nor argument."""
        around = (
            self.lead,
            "<|end|>" if self.lead else "",
            self.opening,
            self.bracket,
            self.begin,
            self.head,
        )
        own = "" if self.arguments is None else str(self.arguments)
        return "\n".join((*around, own, self.tail, self.end, self.closing))

    def of(self, special_tokens: Mapping[str, int]) -> ToolStyle:
        """Return this style as a tokenizer writes it, which has these special tokens."""
        marks = self.marks
        return replace(
            self, special={text: i for text, i in special_tokens.items() if text and text in marks}
        )


def _object(key: str) -> dict[str, Any]:
    return {"head": f'{{"name": NAME, "{key}": ', "tail": "}"}


_DEEPSEEK: dict[str, Any] = {
    "opening": "<｜tool▁calls▁begin｜>",
    "begin": "<｜tool▁call▁begin｜>",
    "end": "<｜tool▁call▁end｜>",
    "closing": "<｜tool▁calls▁end｜>",
}
_GLM_VALUE = re.compile(
    r"\s*<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL
)
_INVOKE = re.compile(r'\s*(?P<name>[^"\n]+)">')

# The first whose signs a template has is its style.
_TABLE = (
    ToolStyle(
        "deepseek_v3_2",
        opening="<｜DSML｜function_calls>\n",
        begin='<｜DSML｜invoke name="',
        head='NAME">\n',
        arguments=Elements(
            '<｜DSML｜parameter name="KEY" string="KIND">',
            "</｜DSML｜parameter>\n",
            re.compile(
                r'\s*<｜DSML｜parameter name="(?P<key>[^"\n]+)" string="(?P<kind>true|false)">'
                r"(?P<value>.*?)</｜DSML｜parameter>",
                re.DOTALL,
            ),
        ),
        end="</｜DSML｜invoke>\n",
        between="",
        closing="</｜DSML｜function_calls>",
        signs=("<｜DSML｜", "function_calls>"),
        read_head=_INVOKE,
    ),
    ToolStyle(
        "deepseek_v3",
        **_DEEPSEEK,
        head="function<｜tool▁sep｜>NAME\n```json\n",
        tail="\n```",
        between="\n",
        signs=("<｜tool▁calls▁begin｜>", "```json"),
        read_head=re.compile(r"\s*function\s*<｜tool▁sep｜>(?P<name>[^\n`<]+?)\s*```json\s*(?=\{)"),
    ),
    ToolStyle(
        "deepseek_v3_1",
        **_DEEPSEEK,
        head="NAME<｜tool▁sep｜>",
        between="",
        signs=("<｜tool▁calls▁begin｜>",),
        read_head=re.compile(r"\s*(?P<name>[^\n<]+?)\s*<｜tool▁sep｜>\s*(?=\{)"),
    ),
    ToolStyle(
        "minimax_m2",
        opening="<minimax:tool_call>\n",
        begin='<invoke name="',
        head='NAME">\n',
        arguments=Elements(
            '<parameter name="KEY">',
            "</parameter>\n",
            re.compile(r'\s*<parameter name="(?P<key>[^"\n]+)">(?P<value>.*?)</parameter>', re.DOTALL),
        ),
        end="</invoke>\n",
        between="",
        closing="</minimax:tool_call>",
        signs=("<minimax:tool_call>",),
        read_head=_INVOKE,
    ),
    ToolStyle(
        "seed_oss",
        begin="<seed:tool_call>\n",
        head="<function=NAME>\n",
        arguments=Elements(
            "<parameter=KEY>",
            "</parameter>\n",
            re.compile(r"\s*<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>", re.DOTALL),
        ),
        tail="</function>",
        end="\n</seed:tool_call>",
        between="\n",
        signs=("<seed:tool_call>",),
        read_head=re.compile(r"\s*<function=(?P<name>[^>\n]+)>"),
    ),
    ToolStyle(
        "qwen3_xml",
        begin="<tool_call>\n",
        head="<function=NAME>\n",
        arguments=Elements(
            "<parameter=KEY>\n",
            "\n</parameter>\n",
            # one line break on each side is the form's
            re.compile(r"\s*<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL),
        ),
        tail="</function>",
        end="\n</tool_call>",
        between="\n",
        signs=("<tool_call>", "<function=", "<parameter="),
        read_head=re.compile(r"\s*<function=(?P<name>[^>\n]+)>"),
    ),
    ToolStyle(
        "glm",
        begin="<tool_call>",
        head="NAME\n",
        arguments=Elements("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n", _GLM_VALUE),
        end="</tool_call>",
        between="\n",
        signs=("<tool_call>", "<arg_key>", "</arg_key>\n<arg_value>"),
        read_head=re.compile(r"\s*(?P<name>[^\s<]+)"),
    ),
    ToolStyle(
        "glm_4_7",
        begin="<tool_call>",
        head="NAME",
        arguments=Elements("<arg_key>KEY</arg_key><arg_value>", "</arg_value>", _GLM_VALUE),
        end="</tool_call>",
        between="",
        signs=("<tool_call>", "<arg_key>"),
        read_head=re.compile(r"\s*(?P<name>[^\s<]+)"),
    ),
    ToolStyle(
        "harmony",
        lead="<|start|>assistant",
        begin="<|channel|>commentary to=functions.",
        head="NAME <|constrain|>json<|message|>",
        # an EOS ends the call
        end="",
        between="",
        signs=("<|channel|>", "<|message|>", "functions"),
        read_head=re.compile(r"(?P<name>[^\s<]+)[^{]*?<\|message\|>\s*(?=\{)"),
    ),
    ToolStyle(
        "gemma4",
        begin="<|tool_call>",
        head="call:NAME",
        arguments=Quoted('<|"|>'),
        end="<tool_call|>",
        between="",
        signs=("<|tool_call>", "<tool_call|>"),
        read_head=re.compile(r"\s*call:(?P<name>[^\s{]+)\s*(?=\{)"),
    ),
    ToolStyle(
        "function_gemma",
        begin="<start_function_call>",
        head="call:NAME",
        arguments=Quoted("<escape>"),
        end="<end_function_call>",
        between="",
        signs=("<start_function_call>",),
        read_head=re.compile(r"\s*call:(?P<name>[^\s{]+)\s*(?=\{)"),
    ),
    ToolStyle(
        "mistral",
        begin="[TOOL_CALLS]",
        head="NAME[ARGS]",
        end="",
        between="",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        read_head=re.compile(r"\s*(?P<name>[^\s\[\]{}]+)(?:\[CALL_ID\][^\[\]{}]*)?\s*(?:\[ARGS\])?\s*(?=\{)"),
    ),
    ToolStyle(
        "mistral_v3",
        opening="[TOOL_CALLS] ",
        bracket="[",
        begin="",
        **_object("arguments"),
        end="",
        between=", ",
        closing="]",
        signs=("[TOOL_CALLS]",),
    ),
    ToolStyle(
        "granite",
        opening="<|tool_call|>",
        bracket="[",
        begin="",
        **_object("arguments"),
        end="",
        between=", ",
        closing="]",
        signs=("<|tool_call|>",),
    ),
    HERMES := ToolStyle(
        "hermes",
        begin="<tool_call>\n",
        **_object("arguments"),
        end="\n</tool_call>",
        between="\n",
        signs=("<tool_call>",),
    ),
    LLAMA3_JSON := ToolStyle(
        "llama3_json",
        begin="",
        **_object("parameters"),
        end="",
        between="; ",
        signs=("tools", '"parameters"'),
    ),
)


def object_style(name: str, begin: str, end: str) -> ToolStyle:
    """Return the form of a JSON object with name and arguments between two marks."""
    return ToolStyle(name, begin=begin, **_object("arguments"), end=end, between="\n")


STYLES = {style.name: style for style in _TABLE}
TOOL_STYLES = ("auto", "none", *STYLES)


def style_of(template: str) -> ToolStyle | None:
    """Return the form of calls that a chat template shows; None: it knows no tools, or calls them in another way.

    >>> style_of("{% if tools %}<tool_call>{{ call }}</tool_call>{% endif %}").name
    'hermes'
    """
    return next((style for style in _TABLE if all(sign in template for sign in style.signs)), None)
