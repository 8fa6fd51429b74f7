"""Fields that agents send to every model, whether it can do what they ask or not: what it cannot is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from myserve.errors import RequestError
from myserve.server.prompts.chat_style import ChatStyle
from myserve.wire.structured import Function, Tool, ToolChoice

__all__ = ["effort_fields", "tool_fields"]


def effort_fields(
    effort: str | None, style: ChatStyle, budget: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a chat that an effort asks for, and what is to be said of one that has no effect.

    A model that thinks, and whose template cannot keep it from that, has a budget of 0 with "none". `budget`: that
    was sent itself.
    """
    if effort is None:
        return {}, []
    try:
        style.template_kwargs(effort, None)
    except RequestError:
        if effort == "none" and style.thinks:
            return {"thinking_token_budget": 0 if budget is None else budget}, []
        return {}, [f"effort {effort!r} has no effect: this model's chat template knows none"]
    return {"reasoning_effort": effort}, []


def tool_fields(
    tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool | None, style: ChatStyle
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a chat that offer tools, and what is to be said of what has no effect.

    Where calls cannot be told from text as they begin, free text cannot be kept to one call, or to strict ones.
    """
    words = []
    if style.tools is not None and not style.tools.is_marked and choice in (None, "auto"):
        if parallel is False and tools:
            words.append("one call at a time has no effect: this model's calls begin like text")
            parallel = None
        if any(tool.function.strict for tool in tools):
            words.append(
                "strict has no effect on tools that need not be called: this model's calls begin like text"
            )
            tools = [_not_strict(tool) for tool in tools]
    offered = {
        "tools": tuple(tools) or None,
        "tool_choice": choice,
        "parallel_tool_calls": parallel if tools else None,
    }
    return offered, words


def _not_strict(tool: Tool) -> Tool:
    said = tool.function
    function = Function(**{name: value for name, value in said if value is not None and name != "strict"})
    return Tool(type="function", function=function)
