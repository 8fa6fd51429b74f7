"""A chat's messages and options: what the next request asks, and what a session's file keeps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myserve.errors import MyserveError

__all__ = ["OPTIONS", "ChatSession", "ChatSessionError"]

FORMAT = "myserve chat 1"
ALTERNATIVES = 5  # of each token, asked for with `probs`

Message = dict[str, str]


class ChatSessionError(MyserveError):
    """A file that holds no session, or an option that cannot have this value."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


# names of options in a request, and how their text is read; their ranges are the server's to check
OPTIONS: Mapping[str, Callable[[str], float]] = {
    "seed": int,
    "temperature": _finite,
    "top_p": _finite,
    "top_k": int,
    "min_p": _finite,
    "max_tokens": int,
}


@dataclass(slots=True)
class ChatSession:
    """Messages without the system's, and how the next answer is asked for.

    >>> talk = ChatSession("m", system="Be brief.")
    >>> talk.ask("Hello"); talk.answered("Hi"); talk.set("temperature", "0.5")
    >>> [message["role"] for message in talk.body()["messages"]], talk.body()["temperature"]
    (['system', 'user', 'assistant'], 0.5)
    >>> talk.undo(), talk.messages
    ('Hello', [])
    """

    model: str
    system: str = ""
    options: dict[str, float] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    probs: bool = False

    def body(self) -> dict[str, Any]:
        """Return the request for the next answer. No tools are offered: what looks like a call is text."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        asked: dict[str, Any] = {"model": self.model, **self.options, "messages": [*head, *self.messages]}
        return asked | ({"logprobs": True, "top_logprobs": ALTERNATIVES} if self.probs else {})

    def ask(self, text: str) -> None:
        """Add what the user says."""
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """Add what the model said."""
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> str | None:
        """Take the last question back, with its answer; return it, None where there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def set(self, name: str, text: str) -> None:
        """Set an option from its text; "off" leaves it to the server. Raises ChatSessionError."""
        if text == "off":
            self.options.pop(name, None)
            return
        try:
            self.options[name] = OPTIONS[name](text)
        except ValueError:
            kind = "an integer" if OPTIONS[name] is int else "a number"
            raise ChatSessionError(f"{name} must be {kind} or off, got {text!r}") from None

    def save(self, path: Path) -> None:
        """Write all to a file, whole or not at all. Raises ChatSessionError."""
        written = {
            "format": FORMAT,
            "model": self.model,
            "system": self.system,
            "options": self.options,
            "messages": self.messages,
        }
        part = path.with_name(path.name + ".part")
        try:
            # for its owner alone: a conversation is private
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(written, file, ensure_ascii=False, indent=1)
            part.replace(path)
        except OSError as error:
            raise ChatSessionError(f"{path} cannot be written: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Take all of it from a file. Raises ChatSessionError; then nothing changes."""
        try:
            read = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ChatSessionError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ChatSessionError(f"{path} is no session of a chat: {error}") from None
        if not _is_session(read):
            raise ChatSessionError(f"{path} is no session of a chat: its format is not {FORMAT!r}")
        self.model, self.system = read["model"], read["system"]
        self.options, self.messages = read["options"], read["messages"]


def _is_session(read: Any) -> bool:
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        return False
    options, messages = read.get("options"), read.get("messages")
    return (
        isinstance(read.get("model"), str)
        and isinstance(read.get("system"), str)
        and isinstance(options, dict)
        and all(name in OPTIONS and isinstance(value, int | float) for name, value in options.items())
        and isinstance(messages, list)
        and all(
            isinstance(message, dict)
            and message.get("role") in ("user", "assistant")
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )
