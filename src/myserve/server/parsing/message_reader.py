"""A choice's text becomes OpenAI's message: thought, content and tool calls, whole or as it comes."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from myserve.server.parsing.marks import ThoughtReader
from myserve.server.parsing.tool_calls import Arguments, CallPiece, CallReader, CallStart, Text
from myserve.wire.responses import ChatDelta, Message, ToolCall, ToolCallDelta

__all__ = ["AnswerReader", "Piece", "Thought"]


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


Piece = Thought | CallPiece


class AnswerReader:
    """Feeds a text through both readers; either may be None, where there is nothing to look for."""

    def __init__(
        self, thinking: ThoughtReader | None, calls: CallReader | None, *, shows_thoughts: bool = True
    ) -> None:
        self._thinking = thinking
        self._shows_thoughts = shows_thoughts
        self._calls = calls
        self._num_calls = 0
        self._fed = 0  # characters
        self._answer_start: int | None = None  # behind the thought

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    def feed(self, text: str, *, last: bool) -> ChatDelta:
        """Return what the message gains with this text; `last`: nothing comes behind it."""
        if self._thinking is None and self._calls is None:
            return {"content": text}
        pieces = self.pieces(text, last=last)
        change: ChatDelta = {}
        if thought := "".join(piece.text for piece in pieces if isinstance(piece, Thought)):
            change["reasoning_content"] = thought
        if content := "".join(piece.text for piece in pieces if isinstance(piece, Text)):
            change["content"] = content
        if calls := self._call_deltas(pieces):
            change["tool_calls"] = calls
        return change

    def pieces(self, text: str, *, last: bool) -> list[Piece]:
        """Return what the message gains as its parts in order, where `feed` joins what is of a kind."""
        thought, said = self._split(text, last)
        self._fed += len(text)
        if said and self._answer_start is None:
            self._answer_start = self._fed - len(said)
        pieces: list[Piece] = [Thought(thought)] if thought and self._shows_thoughts else []
        start = self._answer_start or 0
        if self._calls is None:
            return [*pieces, Text(said, self._fed - len(said))] if said else pieces
        found = [*self._calls.feed(said), *(self._calls.end() if last else ())]
        return [*pieces, *(Text(p.text, p.start + start) if isinstance(p, Text) else p for p in found)]

    def whole(self, text: str) -> Message:
        """Return the message of a whole text: what the deltas of a stream add up to."""
        change = self.feed(text, last=True)
        calls: list[ToolCall] = []
        for delta in change.get("tool_calls", ()):
            if "id" in delta:
                calls.append({"id": delta["id"], "type": "function", "function": delta["function"]})
            else:
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
        said = change.get("content", None if calls else "")
        message: Message = {"role": "assistant", "content": said, "refusal": None}
        if self._thinking is not None and self._shows_thoughts:
            message["reasoning_content"] = change.get("reasoning_content", "")
        if calls:
            message["tool_calls"] = calls
        return message

    def _split(self, text: str, last: bool) -> tuple[str, str]:
        if self._thinking is None:
            return "", text
        thought, said = self._thinking.feed(text)
        if last:
            rest = self._thinking.end()
            thought, said = thought + rest[0], said + rest[1]
        return thought, said

    def _call_deltas(self, pieces: Sequence[Piece]) -> list[ToolCallDelta]:
        deltas: list[ToolCallDelta] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                deltas.append(
                    {
                        "index": self._num_calls,
                        "id": f"call_{uuid.uuid4().hex[:24]}",
                        "type": "function",
                        "function": {"name": piece.name, "arguments": ""},
                    }
                )
                self._num_calls += 1
            elif isinstance(piece, Arguments):
                index = self._num_calls - 1
                if not deltas or deltas[-1]["index"] != index:
                    deltas.append({"index": index, "function": {"arguments": ""}})
                deltas[-1]["function"]["arguments"] += piece.text
        return deltas
