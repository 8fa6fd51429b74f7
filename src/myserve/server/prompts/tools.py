"""A request's tools decide which may be called, and the grammar where a call is forced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from myserve.core.grammar import Grammar, Reasoning
from myserve.core.params import SamplingParams
from myserve.errors import RequestError
from myserve.server.parsing.tool_calls import ToolStyle
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.structured import NamedTool, Schema, Tool

__all__ = ["MAX_TOOLS", "callable_tools", "checked_tools", "constrained"]

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# What may stand beside empty properties in a schema that admits no others.
_OF_NO_PROPERTIES = frozenset(
    {"$schema", "additionalProperties", "description", "properties", "required", "title", "type"}
)
MAX_TOOLS = 128  # OpenAI's own limit


def checked_tools(request: ChatCompletionRequest, style: ToolStyle | None) -> tuple[Tool, ...]:
    """Return the tools that the prompt shows. Raises RequestError."""
    tools = request.tools or ()
    names = [tool.function.name for tool in tools]
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: at most {MAX_TOOLS}, got {len(tools)}", param="tools")
    if len(set(names)) < len(names):
        raise RequestError("tools: two have the same name", param="tools")
    choice = request.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise RequestError("tool_choice asks for a call, and there are no tools", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise RequestError(
            f"tool_choice names {choice.function.name!r}; the tools are {', '.join(names)}",
            param="tool_choice",
        )
    if tools and style is None and choice != "none":
        raise RequestError(
            "this model's chat template does not say how it calls tools; the operator may name a style with "
            "--tool-style",
            param="tools",
        )
    return tools


def callable_tools(request: ChatCompletionRequest, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """Return the tools that may be called."""
    return () if request.tool_choice == "none" else tools


def constrained(
    params: SamplingParams,
    request: ChatCompletionRequest,
    tools: Sequence[Tool],
    style: ToolStyle | None,
    reasoning: Reasoning | None,
) -> SamplingParams:
    """Return the parameters with the grammar that the tools ask for; a thought is outside of it.

    Where a call is wanted, the answer's own form has no say. Where one may be made, the answer is either.
    """
    grammar = params.grammar
    if tools and style is not None:
        grammar = _grammar(request, tools, style, grammar)
    thinks = reasoning is not None and (grammar is not None or reasoning.budget is not None)
    return replace(params, grammar=grammar, reasoning=reasoning if thinks else None)


def _grammar(
    request: ChatCompletionRequest, tools: Sequence[Tool], style: ToolStyle, answer: Grammar | None
) -> Grammar | None:
    choice, one = request.tool_choice, request.parallel_tool_calls is False
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        return Grammar("lark", f"start: call\n{_calls(named, style, style.begin)}")
    calls = "call" if one else f"call ({json.dumps(style.between)} call)*"
    if choice == "required":
        return Grammar("lark", f"start: {calls}\n{_calls(tools, style, style.begin)}")
    if answer is not None:
        if answer.kind != "json_schema":
            raise RequestError(
                "with tools an answer's form can be JSON alone: send response_format, or tool_choice 'none'",
                param="tools",
            )
        return Grammar(
            "lark",
            f"start: answer | {calls}\nanswer: %json {answer.source}\n{_calls(tools, style, style.begin)}",
        )
    if one or any(tool.function.strict for tool in tools):
        return _calls_in_text(tools, style, one=one)
    return None


def _calls_in_text(tools: Sequence[Tool], style: ToolStyle, *, one: bool) -> Grammar:
    """Return the grammar of free text, in which whatever begins like a call goes on as one."""
    if not style.begin:
        raise RequestError(
            f"this model writes calls in the style {style.name}, in which a call cannot be told from text as it "
            "begins: strict tools and parallel_tool_calls false need tool_choice 'required', or a tool's name",
            param="tools",
        )
    # a lazy lexeme is any text up to the mark, which then cannot be read as text
    begin, rest = style.begin.strip(), style.begin[len(style.begin.rstrip()) :]
    return Grammar(
        "lark",
        f"start: {'TEXT | opened call' if one else '(opened call)* TEXT'}\n"
        f"opened[lazy]: TEXT {json.dumps(begin)}\nTEXT: /(.|\\n)*/\n" + _calls(tools, style, rest),
    )


def _calls(tools: Sequence[Tool], style: ToolStyle, begin: str) -> str:
    """Return Lark's rules of one call, of any of these tools."""
    lines = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        header = begin + style.header(tool.function.name)[len(style.begin) :]
        schema = _of_object(tool.function.parameters)
        lines.append(
            f"call_{i}: {json.dumps(header)} arguments_{i} {json.dumps(style.footer)}\n"
            f"arguments_{i}: %json {json.dumps(_compact(schema), ensure_ascii=False)}"
        )
    return "\n".join(lines)


def _of_object(parameters: Schema | None) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which are an object whatever the tool says of them.

    Without parameters, or with none in them, the list is empty, as OpenAI has it: the one object is `{}`.

    >>> _of_object({"properties": {"a": {"type": "integer"}}})
    {'properties': {'a': {'type': 'integer'}}, 'type': 'object'}
    >>> _of_object({"type": "object", "properties": {}})["additionalProperties"]
    False
    """
    if parameters is None or parameters == {}:
        return NO_ARGUMENTS
    schema = dict(parameters) if isinstance(parameters, dict) else {}
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise RequestError(f"a tool's parameters must be of type 'object', got {kinds!r:.80}", param="tools")
    lists_none = (
        schema.get("properties") == {}
        and not schema.keys() - _OF_NO_PROPERTIES
        and not schema.get("additionalProperties")
    )
    return NO_ARGUMENTS if lists_none else schema | {"type": "object"}


def _compact(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of arguments on one line, as models are trained to write them."""
    return {"x-guidance": {"whitespace_pattern": " "}, **schema}
