"""Speaks to the server under test as any client would: OpenAI's completions and chat, read into one form."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from myserve.errors import MyserveError
from myserve.sdk.errors import AttemptFailed
from myserve.sdk.transport.http import AiohttpTransport
from myserve.sdk.transport.pool import root_of
from myserve.sdk.transport.replies import read_all
from myserve.wire.sse import DONE_DATA, SSEDecoder

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "DrawnChoice",
    "DrawnToken",
    "RefusedError",
    "Subject",
    "VerifyError",
    "WireAnswer",
]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CONCURRENT_REQUESTS = 16
_MOST_STALE = 3  # connections that may turn out to be closed, one after another
_ANSWER_BYTES = 64 * 2**20


class VerifyError(MyserveError):
    """A server cannot be tested, or a record cannot be replayed."""


@dataclass(frozen=True, slots=True)
class WireAnswer:
    """Hold what came back over HTTP, as it came."""

    status: int
    raw: bytes

    @property
    def json(self) -> Any:
        """Return the body as JSON; None where it is none."""
        try:
            return json.loads(self.raw)
        except (ValueError, RecursionError):
            return None

    @property
    def message(self) -> str:
        """Return the server's own words for an error."""
        body = self.json
        error = (body.get("error") or body.get("detail") or body) if isinstance(body, dict) else None
        text = error.get("message") if isinstance(error, dict) else error
        return str(text or self.raw.decode("utf-8", "replace"))[:200].replace("\n", " ")


class RefusedError(MyserveError):
    """The server answered with an error status."""

    def __init__(self, answer: WireAnswer) -> None:
        super().__init__(f"{answer.status}: {answer.message}")
        self.answer = answer


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """Hold one token as the server reports it. `name` is "token_id:7" where it names ids, else its text."""

    name: str
    logprob: float | None
    top: Mapping[str, float]

    @property
    def id(self) -> int | None:
        return id_of(self.name)


@dataclass(slots=True)
class DrawnChoice:
    """Hold one choice of an answer, from either route, whole or put together from a stream."""

    text: str = ""
    finish_reason: str | None = None
    tokens: list[DrawnToken] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)  # of a stream

    @property
    def names(self) -> list[str]:
        return [token.name for token in self.tokens]

    @property
    def ids(self) -> list[int]:
        """Return the tokens' ids, as far as the server names them."""
        return [token.id for token in self.tokens if token.id is not None]

    @property
    def numbers(self) -> list[tuple[str, float | None, tuple[tuple[str, float], ...]]]:
        """Return all that is equal, bit for bit, where a server is deterministic."""
        return [(t.name, t.logprob, tuple(sorted(t.top.items()))) for t in self.tokens]


def id_of(name: str) -> int | None:
    """Return the id in a token's name.

    >>> id_of("token_id:7"), id_of("seven")
    (7, None)
    """
    number = name.removeprefix("token_id:")
    return int(number) if number != name and number.isdecimal() else None


class Subject:
    """A server under test, and the model that is asked."""

    def __init__(self, url: str, model: str = "", api_key: str = "") -> None:
        self.url, self.model = root_of(url), model
        self.route = COMPLETIONS
        self.extras: dict[str, Any] = {}  # sent with every request
        self.num_requests = 0
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._transport = AiohttpTransport(stall_timeout=120)
        self._places = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def call(self, method: str, path: str, body: Mapping[str, Any] | bytes | None = None) -> WireAnswer:
        """Return the answer, whatever its status. Raises `AttemptFailed` where there is none."""
        raw = json.dumps(body).encode() if isinstance(body, Mapping) else body
        self.num_requests += 1
        async with self._places:
            for _ in range(_MOST_STALE):
                # a kept connection that the server has closed meanwhile, as some do after an error of theirs
                with suppress(AttemptFailed):
                    return await self._send(method, path, raw)
            return await self._send(method, path, raw)

    async def _send(self, method: str, path: str, raw: bytes | None) -> WireAnswer:
        async with self._transport.request(method, self.url + path, self._headers, raw) as reply:
            return WireAnswer(reply.status, await read_all(reply, _ANSWER_BYTES))

    def body(
        self, prompt: str | Sequence[int], *, logprobs: int | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Return a request in the words of the route. `logprobs`: how many alternatives a token is reported with."""
        body: dict[str, Any] = {"model": self.model, **self.extras}
        if self.route == CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
            if logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": logprobs}
        else:
            body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
            if logprobs is not None:
                body["logprobs"] = logprobs
        return body | fields

    async def ask(
        self, prompt: str | Sequence[int], *, logprobs: int | None = None, **fields: Any
    ) -> list[DrawnChoice]:
        """Return the choices, by index. Raises RefusedError."""
        answer = await self.call("POST", self.route, self.body(prompt, logprobs=logprobs, **fields))
        body = answer.json
        if answer.status != 200 or not isinstance(body, dict) or not body.get("choices"):
            raise RefusedError(answer)
        usage = body.get("usage") or {}
        choices = sorted(body["choices"], key=lambda choice: int(choice.get("index") or 0))
        return [read_choice(choice, usage) for choice in choices]

    async def ask_one(
        self, prompt: str | Sequence[int], *, logprobs: int | None = None, **fields: Any
    ) -> DrawnChoice:
        """Return the first choice. Raises RefusedError."""
        return (await self.ask(prompt, logprobs=logprobs, **fields))[0]

    async def stream(
        self, prompt: str | Sequence[int], *, logprobs: int | None = None, **fields: Any
    ) -> DrawnChoice:
        """Return one choice, put together from its stream. Raises RefusedError, also for an error inside the stream."""
        fields = {"stream": True, "stream_options": {"include_usage": True}, **fields}
        answer = await self.call("POST", self.route, self.body(prompt, logprobs=logprobs, **fields))
        if answer.status != 200:
            raise RefusedError(answer)
        whole = DrawnChoice()
        for event in SSEDecoder().feed(answer.raw):
            if event.data == DONE_DATA:
                continue
            chunk = json.loads(event.data)
            if chunk.get("error"):
                raise RefusedError(WireAnswer(500, event.data.encode()))
            whole.usage = chunk.get("usage") or whole.usage
            for choice in chunk.get("choices") or ():
                part = read_choice(choice, {})
                whole.text += part.text
                whole.pieces.append(part.text)
                whole.tokens += part.tokens
                whole.finish_reason = part.finish_reason or whole.finish_reason
        return whole

    async def aclose(self) -> None:
        await self._transport.aclose()


def read_choice(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> DrawnChoice:
    """Return a choice, or a chunk of one, of either route; logprobs in either of OpenAI's two shapes."""
    said = choice.get("message") or choice.get("delta") or {}
    text = said.get("content") if said else choice.get("text")
    return DrawnChoice(
        text=text or "",
        finish_reason=choice.get("finish_reason"),
        tokens=_tokens(choice.get("logprobs") or {}),
        raw=dict(choice),
        usage=dict(usage),
    )


def _tokens(logprobs: Mapping[str, Any]) -> list[DrawnToken]:
    if logprobs.get("content") is not None:
        return [
            DrawnToken(
                entry["token"],
                entry["logprob"],
                {a["token"]: a["logprob"] for a in entry["top_logprobs"] or ()},
            )
            for entry in logprobs["content"]
        ]
    names = logprobs.get("tokens") or []
    tops = logprobs.get("top_logprobs") or [None] * len(names)
    values = logprobs.get("token_logprobs") or [None] * len(names)
    return [
        DrawnToken(name, value, dict(top or {})) for name, value, top in zip(names, values, tops, strict=True)
    ]


def is_number(value: object) -> bool:
    """Return whether a logprob is one: a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
