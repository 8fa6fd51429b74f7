"""What agents send and a model cannot do is said, and changes nothing else."""

from __future__ import annotations

from myserve.server.parsing.tool_styles import HERMES, LLAMA3_JSON
from myserve.server.prompts.agents import effort_fields, tool_fields
from myserve.server.prompts.chat_style import ChatStyle
from myserve.wire.structured import Function, Tool

STRICT = Tool(type="function", function=Function(name="f", description="d", strict=True))
SWITCHED = ChatStyle(thought=("<think>", "</think>"), variables=frozenset({"enable_thinking"}))


def test_an_effort_is_a_field_where_the_template_knows_one() -> None:
    assert effort_fields("low", SWITCHED, None) == ({"reasoning_effort": "low"}, [])
    assert effort_fields(None, SWITCHED, None) == ({}, [])
    assert effort_fields("none", ChatStyle(), None) == ({"reasoning_effort": "none"}, [])


def test_an_effort_that_no_template_knows_is_said() -> None:
    fields, words = effort_fields("high", ChatStyle(thought=("<think>", "</think>")), None)
    assert fields == {} and "has no effect" in words[0]
    assert effort_fields("none", ChatStyle(thought=("<think>", "</think>")), None) == (
        {"thinking_token_budget": 0},
        [],
    )
    assert effort_fields("none", ChatStyle(thought=("<think>", "</think>")), 7) == (
        {"thinking_token_budget": 7},
        [],
    )


def test_strict_tools_stay_strict_where_they_can() -> None:
    fields, words = tool_fields([STRICT], "auto", False, ChatStyle(HERMES))
    assert (fields["tools"], fields["parallel_tool_calls"], words) == ((STRICT,), False, [])
    fields, words = tool_fields([STRICT], "required", False, ChatStyle(LLAMA3_JSON))
    assert (fields["tools"], words) == ((STRICT,), [])


def test_where_they_cannot_that_is_said() -> None:
    fields, words = tool_fields([STRICT], None, False, ChatStyle(LLAMA3_JSON))
    (tool,) = fields["tools"]
    assert tool.function == Function(name="f", description="d")
    assert "strict" not in tool.model_dump(exclude_unset=True)["function"]
    assert fields["parallel_tool_calls"] is None and len(words) == 2
