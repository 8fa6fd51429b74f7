"""A Responses request's tools become functions; calls of these become items of the tools' own kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from myserve.errors import RequestError
from myserve.grammar.lark.expressions import UnreadableError
from myserve.grammar.lark.reader import LarkGrammar, read_lark, read_pattern
from myserve.server.parsing.tool_styles import ToolStyle
from myserve.server.prompts.call_grammars import why_no_form
from myserve.wire.responses_api.request import ResponseRequest
from myserve.wire.responses_api.tools import ChosenTool, CustomTool, FunctionTool, NamespaceTool
from myserve.wire.structured import Function, FunctionName, NamedTool, Tool, ToolChoice

__all__ = [
    "CUSTOM_INPUT",
    "OfferedTool",
    "OfferedTools",
    "UnreadForm",
    "custom_input",
    "offered_tools",
    "qualified",
]

CUSTOM_INPUT = "input"  # the one argument of a custom tool
LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """The tool that a called function's name stands for."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class UnreadForm(NamedTuple):
    """A form of a custom tool's text that has no effect: what is in it that is not read here."""

    param: str
    syntax: Literal["lark", "regex"]
    definition: str
    reason: str

    def refused(self, error: RequestError) -> RequestError:
        """Return the caller's error for a form that does not compile either."""
        said = str(error)
        # of what begins like no Lark it is tried whether it is GBNF: that it is not says nothing
        reason = self.reason if "GBNF" in said else said.partition(": ")[2] or said
        return RequestError(
            f"{self.param} is no grammar that can be used: {reason}", param=self.param, code="invalid_grammar"
        )


@dataclass(slots=True)
class OfferedTools:
    """The functions of a chat, what each stands for, and what was left out."""

    tools: list[Tool] = field(default_factory=list)
    by_name: dict[str, OfferedTool] = field(default_factory=dict)
    choice: ToolChoice | None = None
    echoed: list[dict[str, Any]] = field(default_factory=list)  # as they were sent
    warnings: list[str] = field(default_factory=list)
    # the grammars of custom tools, by the functions' names, and those that are not read
    forms: dict[str, LarkGrammar] = field(default_factory=dict)
    unread: list[UnreadForm] = field(default_factory=list)


def qualified(namespace: str | None, name: str) -> str:
    """Return the function's name that stands for a namespace's tool.

    >>> qualified("crm", "find"), qualified(None, "find")
    ('crm.find', 'find')
    """
    joined = name if namespace is None else f"{namespace}.{name}"
    return joined if len(joined) <= LONGEST_NAME else name


def custom_input(arguments: str) -> str:
    """Return a custom tool's input, out of the arguments of the function that stands for it.

    >>> custom_input('{"input": "ls"}'), custom_input('{"inp')
    ('ls', '{"inp')
    """
    try:
        value = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    found = value.get(CUSTOM_INPUT) if isinstance(value, dict) else None
    return found if isinstance(found, str) else arguments


def offered_tools(asked: ResponseRequest, style: ToolStyle | None) -> OfferedTools:
    """Return what a request offers to a model that writes calls in a style. Raises RequestError for a choice of what
    is not offered."""
    offered = OfferedTools()
    for position, tool in enumerate(asked.tools or ()):
        param = f"tools[{position}]"
        if isinstance(tool, FunctionTool | CustomTool):
            _offer(offered, tool, None, param, style)
        elif isinstance(tool, NamespaceTool):
            for inside, inner in enumerate(tool.tools):
                _offer(offered, inner, tool.name, f"{param}.tools[{inside}]", style)
        else:
            offered.warnings.append(
                f"{param}: a tool of type {tool.type[:80]!r} was left out: it runs at a provider"
            )
            continue
        offered.echoed.append(tool.model_dump(by_alias=True, exclude_unset=True))
    _choose(offered, asked.tool_choice)
    return offered


def _offer(
    offered: OfferedTools,
    tool: FunctionTool | CustomTool,
    namespace: str | None,
    param: str,
    style: ToolStyle | None,
) -> None:
    name = qualified(namespace, tool.name)
    if name in offered.by_name:
        raise RequestError(f"tools: two have the name {name!r}", param="tools")
    if isinstance(tool, FunctionTool):
        parameters, strict, kind = tool.parameters, tool.strict, "function"
    else:
        parameters, strict, kind = _custom_schema(tool), None, "custom"
        _take_form(offered, tool, name, f"{param}.format.definition", style)
    offered.by_name[name] = OfferedTool("custom" if kind == "custom" else "function", tool.name, namespace)
    function = Function(name=name, description=tool.description, parameters=parameters, strict=strict)
    offered.tools.append(Tool(type="function", function=_without_nulls(function)))


def _without_nulls(function: Function) -> Function:
    """Return a function without the fields that were not sent: templates show the others."""
    return Function(**{name: value for name, value in function if value is not None})


def _custom_schema(tool: CustomTool) -> dict[str, Any]:
    text: dict[str, Any] = {"type": "string"}
    form = tool.format
    if form is not None and form.type == "grammar" and form.syntax == "regex" and form.definition is not None:
        text["pattern"] = f"^(?:{form.definition})$"
    return {
        "type": "object",
        "properties": {CUSTOM_INPUT: text},
        "required": [CUSTOM_INPUT],
        "additionalProperties": False,
    }


def _take_form(
    offered: OfferedTools, tool: CustomTool, name: str, param: str, style: ToolStyle | None
) -> None:
    """Take in a tool's grammar, or say why it has no effect. In JSON a regex has its own, as a schema's pattern."""
    form = tool.format
    if form is None or form.type != "grammar":
        return
    if form.syntax is None or form.definition is None:
        reason: str | None = "it lacks its syntax or its definition"
    elif form.syntax == "regex" and (style is None or style.arguments is None):
        return
    else:
        try:
            grammar = (read_lark if form.syntax == "lark" else read_pattern)(form.definition)
        except UnreadableError as error:
            reason = str(error)
            offered.unread.append(UnreadForm(param, form.syntax, form.definition, reason))
        else:
            reason = None if style is None else why_no_form(grammar, style)
            if reason is None:
                offered.forms[name] = grammar
    if reason is not None:
        offered.warnings.append(f"tools: the grammar of {tool.name!r} has no effect: {reason}")


def _choose(offered: OfferedTools, choice: Literal["none", "auto", "required"] | ChosenTool | None) -> None:
    if not isinstance(choice, ChosenTool):
        if choice == "required" and not offered.tools and offered.warnings:
            offered.warnings.append("tool_choice 'required' has no effect: all tools were left out")
        else:
            offered.choice = choice
    elif choice.type == "allowed_tools":
        _allow(offered, choice)
    elif choice.type in ("function", "custom"):
        name = qualified(choice.namespace, choice.name or "")
        offered.choice = NamedTool(type="function", function=FunctionName(name=name))
    else:
        offered.warnings.append(f"tool_choice {choice.type[:80]!r} has no effect: no such tool runs here")


def _allow(offered: OfferedTools, choice: ChosenTool) -> None:
    """Offer the allowed tools alone: what the prompt does not show is not called."""
    allowed = set(_names(choice.tools or ()))
    if unknown := sorted(allowed - offered.by_name.keys()):
        raise RequestError(
            f"tool_choice allows {unknown[0][:80]!r}, which is no tool here", param="tool_choice"
        )
    offered.tools = [tool for tool in offered.tools if tool.function.name in allowed]
    offered.choice = "required" if choice.mode == "required" else "auto"


def _names(tools: Sequence[dict[str, Any]]) -> Iterator[str]:
    for tool in tools:
        name, namespace = tool.get("name"), tool.get("namespace")
        if tool.get("type") in ("function", "custom") and isinstance(name, str):
            yield qualified(namespace if isinstance(namespace, str) else None, name)
