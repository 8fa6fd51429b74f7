"""Requests of every shape that a fleet must answer with a single server's bytes, and what an answer says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import aiohttp

__all__ = ["Asked", "Told", "ask", "requests"]

# of one answer alone: its name, its time, and what it cost
OWN = re.compile(
    rb'"(id|request_id)":"(cmpl|chatcmpl|gen|call|resp|msg)[-_][0-9a-f]+"|"created":\d+|"cached_tokens":\d+'
)

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


@dataclass(frozen=True)
class Asked:
    """One request: its route and its body."""

    name: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Told:
    """One answer: its status, and what it says choice by choice, without what is its own alone."""

    status: int
    choices: tuple[bytes, ...]
    weight_versions: frozenset[int]


def requests(model: str, seed: int, max_tokens: int = 96) -> list[Asked]:
    """Return a request of each shape that draws by `seed`."""
    story = {"model": model, "seed": seed, "max_tokens": max_tokens, "temperature": 0.9}
    said = {**story, "messages": [{"role": "user", "content": f"Tell me a story, number {seed}."}]}
    completions, chat = "/v1/completions", "/v1/chat/completions"
    generate = {
        "model": model,
        "token_ids": [5 + seed % 64, *range(40, 80)],
        "sampling_params": {
            "seed": seed,
            "max_tokens": max_tokens,
            "logprobs": 2,
            "n": 2,
            "temperature": 1.0,
            "top_p": 0.9,
        },
    }
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    return [
        Asked(
            "completions, streamed",
            completions,
            {**story, **usage, "prompt": "Once upon a time", "logprobs": 3},
        ),
        Asked(
            "completions, whole",
            completions,
            {**story, "prompt": "One day", "n": 2, "return_token_ids": True},
        ),
        Asked(
            "completions, stop",
            completions,
            {**story, **usage, "prompt": "The robot", "stop": ["the f", "."]},
        ),
        Asked(
            "completions, echoed",
            completions,
            {
                **story,
                **usage,
                "prompt": "The sea was",
                "echo": True,
                "logprobs": 1,
                "min_tokens": max_tokens // 2,
            },
        ),
        Asked("chat, n = 3", chat, {**said, **usage, "n": 3, "logprobs": True, "top_logprobs": 2}),
        Asked("chat, penalties", chat, {**said, **usage, "frequency_penalty": 0.7, "presence_penalty": 0.3}),
        Asked(
            "chat, schema",
            chat,
            {
                **said,
                **usage,
                "response_format": {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}},
            },
        ),
        Asked("chat, tool", chat, {**said, **usage, "tools": [TOOL], "tool_choice": "required"}),
        Asked("generate, n = 2", "/inference/v1/generate", {**generate, "stream": True}),
        Asked("torch noise", completions, {**story, **usage, "prompt": "Far away", "noise": "torch"}),
    ]


async def ask(session: aiohttp.ClientSession, url: str, asked: Asked) -> Told:
    """Send a request and return what was told. Raises ClientError where the answer was cut."""
    async with session.post(url + asked.path, json=asked.body) as response:
        body = await response.read()
    if response.status != 200:
        return Told(response.status, (body,), frozenset())
    versions = frozenset(int(v) for v in re.findall(rb'"weight_version":(\d+)', body))
    if not asked.body.get("stream"):
        return Told(response.status, (OWN.sub(b"", body),), versions)
    lines = [line for line in body.split(b"\n") if line.startswith((b"data:", b"event:"))]
    if not lines or lines[-1] != b"data: [DONE]":
        raise aiohttp.ClientPayloadError(f"{asked.name} was cut: {body[-300:]!r}")
    by_choice: dict[int, list[bytes]] = {}
    for line in lines[:-1]:
        data = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: {") else {}
        choices = data.get("choices") or [{}]
        # steps of several choices may come in another order
        by_choice.setdefault(choices[0].get("index", -1), []).append(OWN.sub(b"", line))
    return Told(response.status, tuple(b"\n".join(by_choice[i]) for i in sorted(by_choice)), versions)
