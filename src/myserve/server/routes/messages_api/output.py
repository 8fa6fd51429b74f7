"""Pieces of an answer become blocks, and each step an event: a stream and a whole answer go the same way."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import orjson
from pydantic_core import from_json

from myserve.server.parsing.message_reader import Piece, Thought
from myserve.server.parsing.seals import sealed, signature_of
from myserve.server.parsing.tool_calls import Arguments, CallStart, Text
from myserve.wire.messages_api.answer import BlockOut, MessageEvent

__all__ = ["OutputBlocks", "called_input"]

Events = Iterator[MessageEvent]
INVALID = "INVALID_JSON"  # Anthropic's own name for what a model wrote and is no object


def called_input(arguments: str, *, is_cut: bool) -> str:
    """Return a call's arguments as an object's JSON, spelled as they were written.

    What was cut off is closed, and what is no object stands in one under a name of its own.

    >>> called_input('{"a": 1e5}', is_cut=False), called_input('{"a": 1, "b', is_cut=True)
    ('{"a": 1e5}', '{"a":1}')
    >>> called_input('{a: 1}', is_cut=False)
    '{"INVALID_JSON": "{a: 1}"}'
    """
    try:
        if isinstance(json.loads(arguments, parse_constant=_no_constant), dict):
            return arguments
        if is_cut and isinstance(closed := from_json(arguments or "{}", allow_partial=True), dict):
            return orjson.dumps(closed).decode()
    except (ValueError, TypeError, RecursionError):
        if is_cut:
            return _closed(arguments)
    return json.dumps({INVALID: arguments})


def _closed(arguments: str) -> str:
    try:
        value = from_json(arguments or "{}", allow_inf_nan=False, allow_partial=True)
        return orjson.dumps(value).decode() if isinstance(value, dict) else json.dumps({INVALID: arguments})
    except (ValueError, TypeError):
        return json.dumps({INVALID: arguments})


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class OutputBlocks:
    """The blocks of one answer, as far as they have come. `omits_thoughts`: a thought is told by its seal alone.

    >>> output = OutputBlocks(omits_thoughts=False)
    >>> events = [*output.feed([Thought("Hm."), Text("Yes")]), *output.end(is_cut=False)]
    >>> [event["type"].removeprefix("content_block_") for event in events]
    ['start', 'delta', 'delta', 'stop', 'start', 'delta', 'stop']
    >>> [block["type"] for block in output.blocks]
    ['thinking', 'text']
    """

    def __init__(self, *, omits_thoughts: bool) -> None:
        self.blocks: list[BlockOut] = []  # that have ended
        self._omits_thoughts = omits_thoughts
        self._open: Any = None  # a block, without what its deltas bring
        self._texts: list[str] = []  # of the open one

    @property
    def has_called(self) -> bool:
        """Return whether there is a call, whole or begun."""
        return any(block["type"] == "tool_use" for block in (*self.blocks, *filter(None, [self._open])))

    def feed(self, pieces: Iterable[Piece]) -> Events:
        """Yield what these pieces add."""
        for piece in pieces:
            match piece:
                case Thought():
                    yield from self._into({"type": "thinking", "thinking": "", "signature": ""})
                    if not self._omits_thoughts:
                        yield self._delta({"type": "thinking_delta", "thinking": piece.text})
                    self._texts.append(piece.text)
                case Text():
                    yield from self._into({"type": "text", "text": ""})
                    yield self._delta({"type": "text_delta", "text": piece.text})
                    self._texts.append(piece.text)
                case CallStart():
                    yield from self._close()
                    call_id = f"toolu_{uuid.uuid4().hex[:24]}"
                    yield from self._into(
                        {"type": "tool_use", "id": call_id, "name": piece.name, "input": {}}
                    )
                case Arguments():
                    # told whole: half of an object that turns out to be none could not be taken back
                    self._texts.append(piece.text)

    def end(self, *, is_cut: bool) -> Events:
        """Yield the end of the last block. `is_cut`: it was not the model that ended the answer."""
        yield from self._close(is_cut=is_cut)

    def _into(self, block: Any) -> Events:
        """Begin a block, unless one of its kind is open."""
        if self._open is not None and self._open["type"] == block["type"]:
            return
        yield from self._close()
        self._open = block
        yield {"type": "content_block_start", "index": len(self.blocks), "content_block": dict(block)}  # type: ignore[typeddict-item]

    def _close(self, *, is_cut: bool = False) -> Events:
        if self._open is None:
            return
        block, text = self._open, "".join(self._texts)
        if block["type"] == "thinking":
            signature = sealed(text) if self._omits_thoughts else signature_of(text)
            block |= {"thinking": "" if self._omits_thoughts else text, "signature": signature}
            yield self._delta({"type": "signature_delta", "signature": signature})
        elif block["type"] == "tool_use":
            written = called_input(text, is_cut=is_cut)
            block["input"] = orjson.Fragment(written)
            yield self._delta({"type": "input_json_delta", "partial_json": written})
        else:
            block["text"] = text
        yield {"type": "content_block_stop", "index": len(self.blocks)}
        self.blocks.append(block)
        self._open = None
        self._texts.clear()

    def _delta(self, delta: dict[str, Any]) -> MessageEvent:
        return {"type": "content_block_delta", "index": len(self.blocks), "delta": delta}
