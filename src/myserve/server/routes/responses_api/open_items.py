"""Items that are being written: each tells its beginning, what it gains, and its end as events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from myserve.server.parsing.seals import sealed
from myserve.server.routes.responses_api.offered import OfferedTool, custom_input
from myserve.wire.responses import TokenLogprob
from myserve.wire.responses_api.answer import (
    CustomCallOut,
    FunctionCallOut,
    ItemOut,
    ItemStatus,
    MessageOut,
    OutputText,
    ReasoningOut,
    ReasoningText,
    ResponseEvent,
)

__all__ = ["OpenCall", "OpenItem", "OpenMessage", "OpenReasoning"]

Events = Iterator[ResponseEvent]


class OpenItem(Protocol):
    """An item that has begun."""

    def begin(self) -> Events:
        """Yield the events that begin it."""
        ...

    def end(self, status: ItemStatus) -> Events:
        """Yield the events that end it."""
        ...

    def item(self, status: ItemStatus) -> ItemOut:
        """Return it as far as it has come."""
        ...


class _Item:
    def __init__(self, prefix: str, place: int) -> None:
        self.id = f"{prefix}_{uuid.uuid4().hex}"
        self._place = place

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        return {"type": f"response.{kind}", "item_id": self.id, "output_index": self._place, **fields}  # type: ignore[typeddict-item]

    def _part_event(self, kind: str, **fields: Any) -> ResponseEvent:
        return self._event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, item: ItemOut) -> ResponseEvent:
        return {"type": f"response.output_item.{kind}", "output_index": self._place, "item": item}


class OpenMessage(_Item):
    """A message of one part of text."""

    def __init__(self, place: int, start: int = 0) -> None:
        super().__init__("msg", place)
        self.text_start = start  # in the whole answer, in characters
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def begin(self) -> Events:
        """Yield the events that begin it."""
        yield self._item_event("added", self._as_item("in_progress", []))
        yield self._part_event("content_part.added", part=self._part())

    def gained(self, text: str, logprobs: Sequence[TokenLogprob]) -> Events:
        """Yield the event of more text."""
        self._texts.append(text)
        self._logprobs += logprobs
        yield self._part_event("output_text.delta", delta=text, logprobs=list(logprobs))

    def end(self, status: ItemStatus) -> Events:
        """Yield the events that end it."""
        part = self._part()
        yield self._part_event("output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._part_event("content_part.done", part=part)
        yield self._item_event("done", self.item(status))

    def item(self, status: ItemStatus) -> MessageOut:
        """Return it as far as it has come."""
        return self._as_item(status, [self._part()])

    def _as_item(self, status: ItemStatus, content: list[OutputText]) -> MessageOut:
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self) -> OutputText:
        text = "".join(self._texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}


class OpenReasoning(_Item):
    """A thought. `seals`: it has the thought as one opaque string too."""

    def __init__(self, place: int, *, seals: bool) -> None:
        super().__init__("rs", place)
        self._seals = seals
        self._texts: list[str] = []

    def begin(self) -> Events:
        """Yield the events that begin it."""
        yield self._item_event("added", self._as_item("in_progress", []))
        yield self._part_event("content_part.added", part=self._part())

    def gained(self, text: str) -> Events:
        """Yield the event of more of the thought."""
        self._texts.append(text)
        yield self._part_event("reasoning_text.delta", delta=text)

    def end(self, status: ItemStatus) -> Events:
        """Yield the events that end it."""
        part = self._part()
        yield self._part_event("reasoning_text.done", text=part["text"])
        yield self._part_event("content_part.done", part=part)
        yield self._item_event("done", self.item(status))

    def item(self, status: ItemStatus) -> ReasoningOut:
        """Return it as far as it has come."""
        item = self._as_item(status, [self._part()])
        if self._seals:
            item["encrypted_content"] = sealed("".join(self._texts))
        return item

    def _as_item(self, status: ItemStatus, content: list[ReasoningText]) -> ReasoningOut:
        return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}

    def _part(self) -> ReasoningText:
        return {"type": "reasoning_text", "text": "".join(self._texts)}


class OpenCall(_Item):
    """A call. A function's arguments are told as they come; a custom tool's input, inside of them, at the end."""

    def __init__(self, place: int, tool: OfferedTool) -> None:
        super().__init__("fc" if tool.kind == "function" else "ctc", place)
        self._tool = tool
        self._call_id = f"call_{uuid.uuid4().hex[:24]}"
        self._texts: list[str] = []

    def begin(self) -> Events:
        """Yield the event that begins it."""
        yield self._item_event("added", self._as_item("in_progress", ""))

    def gained(self, text: str) -> Events:
        """Yield the event of more arguments."""
        self._texts.append(text)
        if self._tool.kind == "function":
            yield self._event("function_call_arguments.delta", delta=text)

    def end(self, status: ItemStatus) -> Events:
        """Yield the events that end it."""
        said = self._said()
        if self._tool.kind == "function":
            yield self._event("function_call_arguments.done", arguments=said, name=self._tool.name)
        else:
            yield self._event("custom_tool_call_input.delta", delta=said)
            yield self._event("custom_tool_call_input.done", input=said)
        yield self._item_event("done", self.item(status))

    def item(self, status: ItemStatus) -> FunctionCallOut | CustomCallOut:
        """Return it as far as it has come."""
        return self._as_item(status, self._said())

    def _said(self) -> str:
        arguments = "".join(self._texts)
        return arguments if self._tool.kind == "function" else custom_input(arguments)

    def _as_item(self, status: ItemStatus, said: str) -> FunctionCallOut | CustomCallOut:
        item: FunctionCallOut | CustomCallOut
        if self._tool.kind == "function":
            item = {
                "id": self.id,
                "type": "function_call",
                "status": status,
                "call_id": self._call_id,
                "name": self._tool.name,
                "arguments": said,
            }
        else:
            item = {
                "id": self.id,
                "type": "custom_tool_call",
                "status": status,
                "call_id": self._call_id,
                "name": self._tool.name,
                "input": said,
            }
        if self._tool.namespace is not None:
            item["namespace"] = self._tool.namespace
        return item
