"""Items of a Responses conversation become the messages of a chat: those of one answer are one message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from myserve.errors import RequestError
from myserve.server.parsing.seals import opened
from myserve.server.routes.responses_api.offered import CUSTOM_INPUT, qualified
from myserve.wire.chat import ChatMessage
from myserve.wire.responses_api.items import (
    CallOutputItem,
    CustomCallItem,
    FunctionCallItem,
    InputItem,
    MessageItem,
    ReasoningItem,
    ReferenceItem,
)

__all__ = ["ItemMessages"]


@dataclass(slots=True)
class _Answer:
    """The items of one answer so far: a thought, then text and calls."""

    thought: str = ""
    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def as_message(self) -> ChatMessage:
        return ChatMessage(
            role="assistant",
            content="".join(self.texts) if self.texts else None,
            reasoning_content=self.thought or None,
            tool_calls=tuple(self.calls) or None,
        )


class ItemMessages:
    """Collects items as messages. `warnings` say what was left out.

    >>> said = ItemMessages()
    >>> said.add([MessageItem(role="user", content="hi"), MessageItem(role="assistant", content="yes")], "input")
    >>> [(message.role, message.text) for message in said.messages()]
    [('user', 'hi'), ('assistant', 'yes')]
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._messages: list[ChatMessage] = []
        self._answer: _Answer | None = None
        self._calls: set[str] = set()  # their ids

    def messages(self) -> tuple[ChatMessage, ...]:
        """Return what was collected."""
        self._close()
        return tuple(self._messages)

    def add(self, items: Sequence[InputItem], name: str) -> None:
        """Take in items; `name` is the field that holds them. Raises RequestError for one that does not fit here."""
        for position, item in enumerate(items):
            self._add(item, f"{name}[{position}]")

    def add_instructions(self, text: str) -> None:
        """Take in what stands before all."""
        self._say("system", text)

    def _add(self, item: InputItem, path: str) -> None:
        match item:
            case MessageItem(role="assistant"):
                # text behind a call is of the same answer; a second message without one is another
                self._open(afresh=self._has_said and not self._has_called).texts.append(item.text)
            case MessageItem():
                self._say(item.role, item.text)
            case ReasoningItem():
                self._think(item, path)
            case FunctionCallItem():
                self._call(item, item.arguments)
            case CustomCallItem():
                self._call(item, json.dumps({CUSTOM_INPUT: item.input}, ensure_ascii=False))
            case CallOutputItem():
                self._put_out(item, path)
            case ReferenceItem():
                raise RequestError(
                    f"{path} refers to an item that is not kept here", param=path, code="item_not_found"
                )
            case _:
                self.warnings.append(
                    f"{path}: an item of type {item.type!r} was left out: no such tool runs here"
                )

    def _say(self, role: Any, text: str) -> None:
        self._close()
        self._messages.append(ChatMessage(role=role, content=text))

    def _think(self, item: ReasoningItem, path: str) -> None:
        thought = item.text
        if not thought and item.encrypted_content:
            unsealed = opened(item.encrypted_content, param=f"{path}.encrypted_content")
            thought = unsealed or ""
            if unsealed is None:
                self.warnings.append(f"{path}: a thought was left out: another server has encrypted it")
        elif not thought and item.summary:
            self.warnings.append(f"{path}: a thought was left out: of its text there is a summary alone")
        answer = self._open(afresh=self._has_said or self._has_called)
        answer.thought += thought

    def _call(self, item: FunctionCallItem | CustomCallItem, arguments: str) -> None:
        function = {"name": qualified(item.namespace, item.name), "arguments": arguments}
        self._open().calls.append({"id": item.call_id, "type": "function", "function": function})
        self._calls.add(item.call_id)

    def _put_out(self, item: CallOutputItem, path: str) -> None:
        if item.call_id not in self._calls:
            raise RequestError(
                f"{path}.call_id is {item.call_id[:80]!r}, and no call before it has this id",
                param=f"{path}.call_id",
            )
        self._close()
        self._messages.append(ChatMessage(role="tool", content=item.text, tool_call_id=item.call_id))

    @property
    def _has_said(self) -> bool:
        return self._answer is not None and bool(self._answer.texts)

    @property
    def _has_called(self) -> bool:
        return self._answer is not None and bool(self._answer.calls)

    def _open(self, *, afresh: bool = False) -> _Answer:
        """Return the answer that is collected; a new one where there is none, or `afresh`."""
        if afresh:
            self._close()
        if self._answer is None:
            self._answer = _Answer()
        return self._answer

    def _close(self) -> None:
        if self._answer is not None:
            if self._answer != _Answer():
                self._messages.append(self._answer.as_message())
            self._answer = None
