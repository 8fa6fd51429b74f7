"""Beginnings of a conversation as digests: two that agree were said by the same messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from myserve.errors import RequestError
from myserve.wire.chat import ChatMessage
from myserve.wire.structured import Tool

__all__ = ["beginnings", "behind", "head", "of_thought"]

SIZE = 16  # bytes of a digest


def head(model: str, tools: Sequence[Tool], template_kwargs: dict[str, Any]) -> bytes:
    """Return the digest of what a template writes before the first message, and of whose tokens they are."""
    offered = [tool.model_dump(by_alias=True, exclude_unset=True) for tool in tools]
    return _digest(b"", [model, offered, template_kwargs])


def behind(before: bytes, message: ChatMessage) -> bytes:
    """Return the digest of the messages before, and of this one behind them.

    An answer's thought is not in it, for few clients send it back; spaces around an answer and the form of its calls'
    JSON are not, for clients change them.

    >>> from myserve.wire.chat import ChatMessage
    >>> def call(arguments):
    ...     return ({"type": "function", "id": "1", "function": {"name": "f", "arguments": arguments}},)
    >>> one = ChatMessage(role="assistant", content=None, tool_calls=call('{"a": 1.0,"b":2}'), reasoning_content="hm")
    >>> other = ChatMessage(role="assistant", content="", tool_calls=call('{"b":2, "a":1}'))
    >>> behind(b"", one) == behind(b"", other), behind(b"", one) == behind(b"x", one)
    (True, False)
    """
    return _digest(before, _as_compared(message))


def beginnings(start: bytes, messages: Sequence[ChatMessage]) -> list[bytes]:
    """Return the digests of the first 0, 1, … messages behind `start`; one more than there are messages."""
    chain = [start]
    for message in messages:
        chain.append(behind(chain[-1], message))
    return chain


def of_thought(message: ChatMessage) -> bytes | None:
    """Return the digest of what a message says that was thought before it; None where it says nothing of it."""
    return None if message.thought is None else _digest(b"", [message.thought.strip()])


def _as_compared(message: ChatMessage) -> list[Any]:
    if message.role == "assistant":
        return ["assistant", message.text.strip(), [_call(each) for each in message.tool_calls or ()]]
    role = "system" if message.role == "developer" else message.role
    return [role, message.text, message.name, message.tool_call_id]


def _call(call: dict[str, Any]) -> Any:
    """Return a called name with its arguments, parsed where they are JSON."""
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    try:
        text = arguments.strip() or "{}" if isinstance(arguments, str) else json.dumps(arguments)
        parsed = json.loads(text, parse_float=_number)
    except (ValueError, RecursionError):
        parsed = arguments
    return [function.get("name"), parsed]


def _number(text: str) -> float:
    """Return a number; 2.0 as 2, for JavaScript writes it so."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _digest(before: bytes, value: list[Any]) -> bytes:
    try:
        written = json.dumps(value, sort_keys=True).encode()
    except RecursionError:
        raise RequestError("a message or a tool is nested too deeply", param="messages") from None
    return hashlib.blake2b(before + written, digest_size=SIZE).digest()
