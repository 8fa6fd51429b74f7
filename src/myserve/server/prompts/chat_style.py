"""How one model writes thoughts and tool calls: read off its chat template, or set by the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from myserve.core.grammar import Reasoning
from myserve.errors import RequestError
from myserve.server.parsing.thinking import END, START
from myserve.server.parsing.tool_calls import HERMES, LLAMA3_JSON, STYLES, ToolStyle
from myserve.server.prompts.codec import Codec
from myserve.server.prompts.control_tokens import template_text

__all__ = ["PROMPT_TAIL", "ChatStyle"]

PROMPT_TAIL = 24  # tokens in which a template's opening or closing mark stands


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """`tools` None: its template knows no tools, or calls them in a way that we do not read."""

    tools: ToolStyle | None = None
    thinks: bool = False

    @classmethod
    def of(cls, tokenizer: Any, tool_style: str = "auto") -> ChatStyle:
        """Read the style off the tokenizer's template; `tool_style` other than auto has precedence."""
        template = template_text(tokenizer)
        tools = _tool_style(template) if tool_style == "auto" else STYLES.get(tool_style)
        return cls(tools, thinks=END in template)

    def reasoning(self, codec: Codec, prompt: Sequence[int], budget: int | None) -> Reasoning | None:
        """Return how the answer to this prompt begins; None: without a thought.

        Raises RequestError for a budget where the model has no thoughts.
        """
        if not self.thinks:
            if budget is not None:
                raise RequestError(
                    f"thinking_token_budget: this model's chat template knows no {START}",
                    param="thinking_token_budget",
                )
            return None
        tail = codec.decode(prompt[-PROMPT_TAIL:], skip_special_tokens=False).rstrip()
        if tail.endswith(END):
            return None  # the template has done the thinking: enable_thinking false
        return Reasoning(START, END, begun=tail.endswith(START), budget=budget)


def _tool_style(template: str) -> ToolStyle | None:
    if HERMES.begin.strip() in template:
        return HERMES
    if "tools" in template and '"parameters"' in template and "[TOOL_CALLS]" not in template:
        return LLAMA3_JSON
    return None
