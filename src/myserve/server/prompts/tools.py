"""A request's tools decide which may be called, and the grammar where a call is forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from myserve.core.grammar import Grammar, Reasoning
from myserve.core.params import SamplingParams
from myserve.errors import RequestError
from myserve.server.parsing.tool_styles import ToolStyle
from myserve.server.prompts.call_grammars import Forms, calls_in_text, forced_calls, rules_of_calls
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.structured import NamedTool, Tool

__all__ = ["MAX_TOOLS", "callable_tools", "checked_tools", "constrained"]

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
    forms: Forms | None = None,
) -> SamplingParams:
    """Return the parameters with the grammar that the tools ask for; a thought is outside of it.

    Where a call is wanted, the answer's own form has no say. Where one may be made, the answer is either. `forms`: the
    grammars of those tools whose one parameter is a text that has one.
    """
    grammar = params.grammar
    if tools and style is not None:
        grammar = _grammar(request, tools, style, grammar, forms)
    thinks = reasoning is not None and (grammar is not None or reasoning.budget is not None)
    shown = {*(style.shown_ids if tools and style else ()), *(reasoning.shown_ids if reasoning else ())}
    return replace(
        params,
        grammar=grammar,
        reasoning=reasoning if thinks else None,
        shown_special_ids=tuple(sorted(shown)),
    )


def _grammar(
    request: ChatCompletionRequest,
    tools: Sequence[Tool],
    style: ToolStyle,
    answer: Grammar | None,
    forms: Forms | None,
) -> Grammar | None:
    choice, one = request.tool_choice, request.parallel_tool_calls is False
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        rules = rules_of_calls(named, style, forms=forms)
        return Grammar("lark", f"start: {forced_calls(style, one=True)}\n{rules}")
    if choice == "required":
        rules = rules_of_calls(tools, style, forms=forms)
        return Grammar("lark", f"start: {forced_calls(style, one=one)}\n{rules}")
    if answer is not None:
        if answer.kind != "json_schema":
            raise RequestError(
                "with tools an answer's form can be JSON alone: send response_format, or tool_choice 'none'",
                param="tools",
            )
        calls = forced_calls(style, one=one)
        rules = rules_of_calls(tools, style, forms=forms)
        return Grammar("lark", f"start: answer | {calls}\nanswer: %json {answer.source}\n{rules}")
    if one or any(tool.function.strict for tool in tools):
        return Grammar("lark", calls_in_text(tools, style, one=one, forms=forms))
    return None
