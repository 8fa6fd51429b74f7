"""Answers of three routes, whole or put together from a stream, in one form that can be compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

__all__ = ["Answer", "AnsweredChoice", "Sendable", "ask"]


class Sendable(Protocol):
    """A request to one of the three routes."""

    @property
    def path(self) -> str: ...

    def body(self, *, stream: bool) -> dict[str, Any]: ...


@dataclass
class AnsweredChoice:
    """What one choice said; text, ids and entries joined over the chunks of a stream."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: list[Any] = field(default_factory=list)  # logprobs, a token each
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    seed: int | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Any] | None = None

    def take(self, choice: dict[str, Any]) -> None:
        """Take in a choice of a chunk, or the whole one."""
        said = choice.get("message") or choice.get("delta") or choice
        self.text += said.get("content") or said.get("text") or ""
        self.token_ids += choice.get("token_ids") or []
        self.entries += _entries(choice.get("logprobs"))
        for name in ("finish_reason", "stop_reason", "seed", "prompt_token_ids", "prompt_logprobs"):
            if choice.get(name) is not None:
                setattr(self, name, choice[name])


@dataclass
class Answer:
    """What came back: choices, or an error."""

    status: int
    choices: list[AnsweredChoice] = field(default_factory=list)
    error: dict[str, Any] | None = None

    @property
    def is_fault(self) -> bool:
        """Whether the server blames itself."""
        own = self.error is not None and self.error.get("type") == "server_error"
        return self.status >= 500 or own


def _entries(logprobs: dict[str, Any] | None) -> list[Any]:
    if not logprobs:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    names = ("tokens", "token_logprobs", "top_logprobs")
    return [
        list(row)
        for row in zip(*(logprobs[name] for name in names if logprobs.get(name) is not None), strict=True)
    ]


async def ask(session: aiohttp.ClientSession, case: Sendable, *, stream: bool) -> Answer:
    """Send a case and read its whole answer."""
    async with session.post(case.path, json=case.body(stream=stream)) as reply:
        body = await reply.text()
        events = [json.loads(body)] if not stream or reply.status != 200 else _events(body)
        choices: dict[int, AnsweredChoice] = {}
        for event in events:
            if "error" in event:
                # an error in mid-stream is told with the status that a whole answer would have had
                status = reply.status if reply.status != 200 else _status_of(event["error"])
                return Answer(status, error=event["error"])
            for choice in event["choices"]:
                choices.setdefault(choice["index"], AnsweredChoice()).take(choice)
            if event.get("prompt_logprobs") is not None:  # beside the choices on the token route
                choices[0].prompt_logprobs = event["prompt_logprobs"]
        return Answer(reply.status, [choices[index] for index in sorted(choices)])


def _status_of(error: dict[str, Any]) -> int:
    return 500 if error.get("type") == "server_error" else 400


def _events(body: str) -> list[Any]:
    lines = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
    assert (lines and lines[-1] == "[DONE]") or "error" in lines[-1], (
        f"a stream without an end: {body[-200:]}"
    )
    return [json.loads(line) for line in lines if line != "[DONE]"]
