"""One model's syntax of thoughts and tool calls: read off its chat template, or set by the operator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from myserve.core.grammar import Reasoning
from myserve.errors import RequestError
from myserve.server.parsing.channels import CHANNEL_MARKS, CHANNEL_TOKENS
from myserve.server.parsing.thinking import THOUGHT_MARKS
from myserve.server.parsing.tool_styles import STYLES, ToolStyle, style_of
from myserve.server.prompts.codec import Codec
from myserve.server.prompts.control_tokens import template_text
from myserve.server.prompts.response_template import response_styles

__all__ = ["PROMPT_TAIL", "ChatStyle"]

PROMPT_TAIL = 24  # tokens in which a template's opening or closing mark stands
# Variables by which templates of different families switch thoughts on and off.
SWITCHES = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """`tools` None: its template knows no tools, or calls them in a way that we do not read.

    `thought`: the marks around a thought, None where the template knows none. `variables`: those of a template that
    say how much is thought. `special`: the tokenizer's special tokens.
    """

    tools: ToolStyle | None = None
    thought: tuple[str, str] | None = None
    variables: frozenset[str] = frozenset()
    special: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, tool_style: str = "auto", template: str | None = None) -> ChatStyle:
        """Read the style off the tokenizer's template, or off another; `tool_style` but auto has precedence."""
        own = (None, None) if template is not None else response_styles(tokenizer)
        template = template_text(tokenizer) if template is None else template
        added = tokenizer.added_tokens_decoder.items()
        special = {str(token): i for i, token in added if getattr(token, "special", False)}
        tools = style_of(template) or own[0] if tool_style == "auto" else STYLES.get(tool_style)
        thought = next((marks for marks in THOUGHT_MARKS if marks[1] in template), None)
        if all(mark in template for mark in ("<|channel|>", "<|message|>")):
            thought = CHANNEL_MARKS
        thought = thought or own[1]
        variables = {name for name in (*SWITCHES, EFFORT) if re.search(rf"\b{name}\b", template)}
        return cls(tools and tools.of(special), thought, frozenset(variables), special)

    @property
    def thinks(self) -> bool:
        """Return whether an answer may begin with a thought."""
        return self.thought is not None

    def template_kwargs(self, effort: str | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what a template gets beside the messages: `given`, and what says `effort` in this model's template.

        Templates of several efforts get its name; those that think or do not, whether it is more than "none".
        Raises RequestError where the template knows neither.
        """
        said: dict[str, Any] = {}
        if effort is not None:
            said = {name: effort != "none" for name in SWITCHES if name in self.variables}
            if EFFORT in self.variables:
                said[EFFORT] = effort
            if not said and (self.thinks or effort != "none"):
                raise RequestError(
                    f"reasoning_effort: this model's chat template knows none of {EFFORT}, {', '.join(SWITCHES)}, so "
                    "nothing would change",
                    param="reasoning_effort",
                )
        return said | dict(given or {})

    def switched_on(self) -> dict[str, Any]:
        """Return what has a template think that may do so or not."""
        return {name: True for name in SWITCHES if name in self.variables}

    def reasoning(
        self, codec: Codec, prompt: Sequence[int], budget: int | None, continued: str = ""
    ) -> Reasoning | None:
        """Return how the answer to this prompt begins; None: without a thought.

        `continued` is the text of the message that it goes on with: in a thought that is open there, or in the answer.
        Raises RequestError for a budget where the model has no thoughts.
        """
        if self.thought is None:
            if budget is not None:
                raise RequestError(
                    f"thinking_token_budget: this model's chat template knows no {THOUGHT_MARKS[0][0]}",
                    param="thinking_token_budget",
                )
            return None
        start, end = self.thought
        marks = "".join(CHANNEL_TOKENS) if self.thought == CHANNEL_MARKS else start + end
        shown = tuple(sorted(i for text, i in self.special.items() if text and text in marks))
        if continued:
            is_open = continued.lstrip().startswith(start) and end not in continued
            return (
                Reasoning(start, end, starts_inside=True, budget=budget, shown_ids=shown) if is_open else None
            )
        tail = codec.decode(prompt[-PROMPT_TAIL:], skip_special_tokens=False).rstrip()
        if tail.endswith(end):
            return None  # the template has done the thinking: enable_thinking false
        return Reasoning(
            start, end, starts_inside=tail.endswith(start.rstrip()), budget=budget, shown_ids=shown
        )
