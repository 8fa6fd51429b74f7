"""One Responses request as a chat: its conversation, its tools, its form, and what of it had no effect."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from myserve.server.models.models import ServedModel
from myserve.server.prompts.agents import effort_fields, tool_fields
from myserve.server.prompts.required_prefix import DrawnTurns
from myserve.server.routes.responses_api.conversation import ItemMessages
from myserve.server.routes.responses_api.offered import OfferedTools, offered_tools
from myserve.wire.base import to_json
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.fields import GenerationRequest
from myserve.wire.responses_api.items import InputItem, MessageItem, joined, write_items
from myserve.wire.responses_api.request import ResponseRequest
from myserve.wire.responses_api.tools import ChosenTool
from myserve.wire.structured import ResponseFormat

__all__ = ["Earlier", "ResponseTurn", "turn_of"]

_OWN = frozenset(
    {"n", "max_tokens", "stream_options"}
)  # that are no field of this route, or mean something else
_ID_PREFIX = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "function_call_output": "fco",
    "custom_tool_call_output": "ctco",
}
_PASSED_ON = ("user", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True, slots=True)
class Earlier:
    """The turns before this one: their items, and the ids that they were drawn as, where these can be kept."""

    items: Sequence[InputItem] = ()
    written: bytes = b"[]"  # these, as JSON
    token_ids: Sequence[int] | None = None
    # what stood before the items in their prompt, as digests
    shown: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class ResponseTurn:
    """A request as a chat, and what its answer tells of it beside what was drawn."""

    asked: ResponseRequest
    chat: ChatCompletionRequest
    offered: OfferedTools
    items: Sequence[InputItem]  # of this request alone
    earlier: Earlier
    drawn: DrawnTurns | None
    shown: Mapping[str, bytes]
    echoed: Any  # the fields of a response that repeat the request's
    words: list[str]
    _listed: list[dict[str, Any]] | None = None

    def warnings(self) -> list[str]:
        """Return what was asked for and has no effect."""
        lost = self.drawn.lost if self.drawn is not None else None
        words = [f"earlier turns were tokenized again: {lost}"] if lost else []
        return [*self.words, *words]

    def listed_items(self) -> list[dict[str, Any]]:
        """Return this request's items as they are listed later: each with an id, a message's content as parts."""
        if self._listed is None:
            self._listed = [_listed(item) for item in self.items]
        return self._listed

    def conversation(self, output: Sequence[Mapping[str, Any]]) -> bytes:
        """Return all items as JSON: those before, this request's and its answer's."""
        return joined(self.earlier.written, write_items(self.items), to_json(output))


def turn_of(asked: ResponseRequest, model: ServedModel, earlier: Earlier) -> ResponseTurn:
    """Return the chat that a request asks for. Raises RequestError for items and tools that cannot be read."""
    said, offered = ItemMessages(), offered_tools(asked, model.style.tools)
    if asked.instructions:
        said.add_instructions(asked.instructions)
    said.add(earlier.items, "previous_response_id")
    items = _items(asked)
    said.add(items, "input")
    fields = _sampling_fields(asked) | _form(asked)
    thinking, words = _thinking(asked, model)
    choice = offered.choice if offered.tools or not asked.tools else None
    tools, more = tool_fields(offered.tools, choice, asked.parallel_tool_calls, model.style)
    fields |= thinking | tools | {"messages": said.messages()}
    chat = ChatCompletionRequest(**{name: value for name, value in fields.items() if value is not None})
    chat.check()
    shown = {
        "model": asked.model,
        "instructions": asked.instructions or None,
        "tools": [tool.model_dump(by_alias=True) for tool in offered.tools],
        "template": [chat.chat_template, chat.chat_template_kwargs, chat.reasoning_effort],
    }
    digests = {name: _digest(value) for name, value in shown.items()}
    drawn, lost = _drawn(earlier, digests)
    words = [*offered.warnings, *said.warnings, *words, *more, *_without_effect(asked), *lost]
    return ResponseTurn(asked, chat, offered, items, earlier, drawn, digests, _echoed(asked, offered), words)


def _items(asked: ResponseRequest) -> Sequence[InputItem]:
    if isinstance(asked.input, str):
        return (MessageItem(role="user", content=asked.input),) if asked.input else ()
    return asked.input or ()


def _listed(item: InputItem) -> dict[str, Any]:
    listed = item.model_dump(by_alias=True, exclude_unset=True)
    if isinstance(item, MessageItem):
        kind = "output_text" if item.role == "assistant" else "input_text"
        if isinstance(item.content, str):
            listed["content"] = [{"type": kind, "text": item.content}]
        listed["type"] = "message"
    if item.type != "item_reference":
        listed.setdefault("status", "completed")
        listed["id"] = listed.get("id") or f"{_ID_PREFIX.get(str(listed['type']), 'item')}_{uuid.uuid4().hex}"
    return listed


def _sampling_fields(asked: ResponseRequest) -> dict[str, Any]:
    """Return the fields that both routes have, as they were sent."""
    same = [
        *GenerationRequest.model_fields,
        "chat_template_kwargs",
        "thinking_token_budget",
        "include_reasoning",
    ]
    fields = {name: getattr(asked, name) for name in same if name not in _OWN}
    fields["max_completion_tokens"] = asked.max_output_tokens
    fields["logprobs"] = True if asked.logprobs or asked.shows_logprobs else None
    return fields


def _form(asked: ResponseRequest) -> dict[str, Any]:
    form = asked.text.format if asked.text is not None else None
    if form is None or form.type == "text":
        return {}
    schema = {"json_schema": {"schema": form.schema_}} if form.type == "json_schema" else {}
    return {"response_format": ResponseFormat.model_validate({"type": form.type, **schema})}


def _thinking(asked: ResponseRequest, model: ServedModel) -> tuple[dict[str, Any], list[str]]:
    """Return the fields that `reasoning.effort` stands for. Agents send one to every model: it may have no effect."""
    effort = asked.reasoning.effort if asked.reasoning is not None else None
    return effort_fields(effort, model.style, asked.thinking_token_budget)


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def _drawn(earlier: Earlier, shown: Mapping[str, bytes]) -> tuple[DrawnTurns | None, list[str]]:
    if earlier.token_ids is None:
        return None, []
    changed = [name for name, value in shown.items() if earlier.shown.get(name) != value]
    if changed:
        return None, [f"earlier turns were tokenized again: {' and '.join(changed)} changed"]
    return DrawnTurns(earlier.token_ids), []


def _without_effect(asked: ResponseRequest) -> list[str]:
    words = []
    if asked.text is not None and asked.text.verbosity not in (None, "medium"):
        words.append(f"text.verbosity {asked.text.verbosity!r} has no effect")
    summary = asked.reasoning and (asked.reasoning.summary or asked.reasoning.generate_summary)
    if summary and summary != "none":
        words.append("reasoning.summary has no effect: the thought itself is in the answer")
    if asked.service_tier not in (None, "auto", "default"):
        words.append(f"service_tier {asked.service_tier[:80]!r} has no effect; priority has one")
    if asked.max_tool_calls is not None:
        words.append("max_tool_calls has no effect: it is about tools that run at a provider")
    words += [
        f"{name} has no effect" for name in ("context_management",) if (asked.model_extra or {}).get(name)
    ]
    return words


def _echoed(asked: ResponseRequest, offered: OfferedTools) -> dict[str, Any]:
    """Return what a response repeats of its request, defaults filled in."""
    extra = asked.model_extra or {}
    choice = asked.tool_choice
    said = choice.model_dump(exclude_unset=True) if isinstance(choice, ChosenTool) else choice
    form = asked.text.format if asked.text is not None else None
    return {
        "background": bool(asked.background),
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": asked.is_stored,
        "temperature": 1.0 if asked.temperature is None else float(asked.temperature),
        "text": {
            "format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_unset=True)
        },
        "tool_choice": "auto" if said is None else said,
        "tools": offered.echoed,
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": 1.0 if asked.top_p is None else float(asked.top_p),
        "truncation": asked.truncation or "disabled",
        **{name: extra[name] for name in _PASSED_ON if isinstance(extra.get(name), str)},
    }
