"""One request to the Messages API as a chat: its messages, its tools, its thinking, and what had no effect."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from myserve.core.params import SamplingParams
from myserve.errors import RequestError
from myserve.server.models.models import ServedModel
from myserve.server.parsing.seals import unsealed
from myserve.server.prompts.agents import effort_fields, tool_fields
from myserve.wire.chat import ChatCompletionRequest, ChatMessage
from myserve.wire.fields import GenerationRequest
from myserve.wire.messages_api.blocks import (
    Block,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    text_of_blocks,
)
from myserve.wire.messages_api.request import ClientTool, CountTokensRequest, MessageTurn
from myserve.wire.structured import Function, FunctionName, NamedTool, ResponseFormat, Tool, ToolChoice

__all__ = ["MessagesTurn", "messages_turn"]

_OWN = frozenset({"n", "stream_options"})
_CHOICES: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(slots=True)
class MessagesTurn:
    """A request as a chat, and what its answer tells of it beside what was drawn."""

    asked: CountTokensRequest
    chat: ChatCompletionRequest
    words: list[str]
    fills_context: bool = False  # `max_tokens` is more than the context leaves

    def fitting(self, params: SamplingParams, room: int) -> SamplingParams:
        """Return the parameters with the limit that the context sets, where `max_tokens` is more.

        Clients of this API send one number for every prompt; that the context was full is the message's stop reason.
        """
        if params.max_tokens is None or params.max_tokens <= room or room < 1:
            return params
        self.fills_context = True
        return replace(params, max_tokens=room)

    @property
    def omits_thoughts(self) -> bool:
        """Return whether thoughts are told by their seals alone."""
        return self.asked.thinking is not None and self.asked.thinking.display == "omitted"


@dataclass(slots=True)
class _ReadSoFar:
    messages: list[ChatMessage] = field(default_factory=list)
    calls: set[str] = field(default_factory=set)  # their ids
    words: list[str] = field(default_factory=list)


def messages_turn(asked: CountTokensRequest, model: ServedModel) -> MessagesTurn:
    """Return the chat that a request asks for. Raises RequestError for blocks and tools that cannot be read."""
    reading = _ReadSoFar()
    if asked.system:
        reading.messages.append(ChatMessage(role="system", content=text_of_blocks(asked.system)))
    for number, turn in enumerate(asked.messages):
        _read(turn, f"messages[{number}]", reading)
    tools, words = _tools(asked)
    thinking, more = _thinking(asked, model)
    choice, one = _choice(asked, tools)
    calling, yet_more = tool_fields(tools, choice, False if one else None, model.style)
    fields = _sampling_fields(asked) | _form(asked) | thinking | calling
    goes_on = asked.messages[-1].role == "assistant"
    fields |= {
        "messages": tuple(reading.messages),
        "continue_final_message": True if goes_on else None,
    }
    chat = ChatCompletionRequest(**{name: value for name, value in fields.items() if value is not None})
    chat.check()
    return MessagesTurn(asked, chat, [*reading.words, *words, *more, *yet_more, *_without_effect(asked)])


def _read(turn: MessageTurn, path: str, reading: _ReadSoFar) -> None:
    said = turn.content
    blocks: tuple[Block, ...] = (TextBlock(type="text", text=said),) if isinstance(said, str) else said
    if turn.role == "assistant":
        _read_answer(blocks, path, reading)
        return
    texts: list[str] = []

    def say() -> None:
        if texts:
            reading.messages.append(ChatMessage(role=turn.role, content="".join(texts)))
            texts.clear()

    for number, block in enumerate(blocks):
        here = f"{path}.content[{number}]"
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock):
            say()
            _read_result(block, here, reading)
        elif isinstance(block, ThinkingBlock | ToolUseBlock):
            raise RequestError(
                f"{here}: only the assistant's messages have blocks of type {block.type!r}", param=here
            )
        else:
            _leave_out(block, here, reading)
    if not blocks:
        texts.append("")
    say()


def _read_answer(blocks: tuple[Block, ...], path: str, reading: _ReadSoFar) -> None:
    thought, texts, calls = "", [], []
    for number, block in enumerate(blocks):
        here = f"{path}.content[{number}]"
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thought += unsealed(block.thinking, block.signature, param=f"{here}.signature")
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
            reading.calls.add(block.id)
        elif isinstance(block, ToolResultBlock):
            raise RequestError(f"{here}: results of tools stand in the user's messages", param=here)
        else:
            _leave_out(block, here, reading)
    reading.messages.append(
        ChatMessage(
            role="assistant",
            content="".join(texts) if texts else None,
            reasoning_content=thought or None,
            tool_calls=tuple(calls) or None,
        )
    )


def _read_result(block: ToolResultBlock, path: str, reading: _ReadSoFar) -> None:
    if block.tool_use_id not in reading.calls:
        raise RequestError(
            f"{path}.tool_use_id is {block.tool_use_id[:80]!r}, and no tool_use before it has this id",
            param=f"{path}.tool_use_id",
        )
    content = text_of_blocks(block.content)
    reading.messages.append(ChatMessage(role="tool", content=content, tool_call_id=block.tool_use_id))
    if block.is_error:
        reading.words.append(f"{path}.is_error has no effect: chat templates show a result's content alone")


def _leave_out(block: Any, path: str, reading: _ReadSoFar) -> None:
    reading.words.append(f"{path}: a block of type {block.type!r} was left out: it is a provider's own")


def _sampling_fields(asked: CountTokensRequest) -> dict[str, Any]:
    """Return the fields that both routes have, as they were sent."""
    same = [*GenerationRequest.model_fields, "chat_template_kwargs", "thinking_token_budget"]
    fields = {name: getattr(asked, name) for name in same if name not in _OWN}
    if asked.stop_sequences is not None:
        fields["stop"] = asked.stop_sequences
    fields["logprobs"] = True if asked.logprobs or asked.top_logprobs else None
    return fields


def _form(asked: CountTokensRequest) -> dict[str, Any]:
    form = asked.output_config.format if asked.output_config is not None else None
    form = form or asked.output_format
    if form is None:
        return {}
    wanted = {"type": "json_schema", "json_schema": {"schema": form.schema_}}
    return {"response_format": ResponseFormat.model_validate(wanted)}


def _tools(asked: CountTokensRequest) -> tuple[list[Tool], list[str]]:
    tools, words = [], []
    for number, tool in enumerate(asked.tools or ()):
        if isinstance(tool, ClientTool):
            said = {"description": tool.description, "strict": tool.strict}
            function = Function(
                name=tool.name,
                parameters=tool.input_schema,
                **{name: value for name, value in said.items() if value is not None},  # type: ignore[arg-type]
            )
            tools.append(Tool(type="function", function=function))
        else:
            words.append(
                f"tools[{number}]: a tool of type {tool.type[:80]!r} was left out: it is Anthropic's own"
            )
    return tools, words


def _choice(asked: CountTokensRequest, tools: list[Tool]) -> tuple[ToolChoice | None, bool]:
    """Return which tool is called, and whether no more than one."""
    choice = asked.tool_choice
    if choice is None or (asked.tools and not tools):
        return None, False
    named = NamedTool(type="function", function=FunctionName(name=choice.name or ""))
    return _CHOICES.get(choice.type, named), bool(choice.disable_parallel_tool_use)


def _thinking(asked: CountTokensRequest, model: ServedModel) -> tuple[dict[str, Any], list[str]]:
    """Return the fields that `thinking` and `effort` stand for, below those that were sent themselves.

    Without either the model thinks as its template has it, as on the chat route.
    """
    config, style = asked.thinking, model.style
    effort: str | None = asked.output_config.effort if asked.output_config is not None else None
    if config is not None and config.type == "disabled":
        effort = "none"
    fields, words = effort_fields(effort, style, asked.thinking_token_budget)
    if config is not None and config.type == "enabled":
        if not style.thinks:
            return fields, [*words, "thinking has no effect: this model's chat template has no thoughts"]
        fields["chat_template_kwargs"] = style.switched_on() | (asked.chat_template_kwargs or {})
        budget = asked.thinking_token_budget
        fields["thinking_token_budget"] = config.budget_tokens if budget is None else budget
    return fields, words


def _without_effect(asked: CountTokensRequest) -> list[str]:
    extra = asked.model_extra or {}
    words = [
        f"{name} has no effect" for name in ("container", "context_management", "speed") if extra.get(name)
    ]
    if asked.service_tier not in (None, "auto", "standard_only"):
        words.append(f"service_tier {asked.service_tier[:80]!r} has no effect; priority has one")
    return words
