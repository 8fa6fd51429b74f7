"""The load generator: sends requests, and notes when bytes came. Nothing is decoded while the clock runs.

The client often shares its cores with the server that it measures, so every microsecond spent here is charged to
the server. Hence aiohttp (a twentieth of httpx' CPU a stream), bytes kept as they came, and JSON read afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from myserve.bench.figures import Figures, RequestTimes, figures
from myserve.bench.workload import SAMPLING, Prompt, Workload
from myserve.errors import MyserveError
from myserve.sdk.errors import AttemptFailed
from myserve.sdk.transport.chunks import ChoiceChunk, chunks_of
from myserve.sdk.transport.http import AiohttpTransport
from myserve.sdk.transport.pool import url_of
from myserve.sdk.transport.replies import failure_of, read_json
from myserve.wire.sse import DONE_DATA, SSEDecoder

__all__ = ["Arrival", "BenchError", "ServerFeatures", "Target", "TimedRequest", "traces_of"]

# From what our server, vLLM and llama.cpp take down to what every completions server takes. The first set that a
# server answers with 200 is used: `ignore_eos` makes runs equally long, `stream_options` counts their tokens.
_USAGE = {"stream_options": {"include_usage": True}}
_EXTRAS: tuple[Mapping[str, Any], ...] = (_USAGE | {"ignore_eos": True}, _USAGE, {})
_OPENAI_SAMPLING = ("temperature", "top_p", "logprobs")


class BenchError(MyserveError):
    """The server cannot be measured: it refused, failed, or answered something else than asked."""


@dataclass(frozen=True, slots=True)
class ServerFeatures:
    """Describe what a server understands: token ids as prompts, fields beyond OpenAI's."""

    takes_ids: bool
    extras: Mapping[str, Any]
    takes_filters: bool = True  # top_k and min_p

    def body(self, model: str, workload: Workload, prompt: Prompt, seed: int | None = None) -> dict[str, Any]:
        """Return the request for one prompt; with a `seed`, one whose draws can be repeated.

        >>> ServerFeatures(True, {}).body("m", Workload(1, 2, 3), [7, 8], seed=5)
        {'model': 'm', 'prompt': [7, 8], 'max_tokens': 3, 'stream': True, 'temperature': 0.0, 'seed': 5}
        """
        sampling = SAMPLING[workload.sampling]
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": workload.output_len}
        body |= {"stream": True, **self.extras}
        body |= {k: v for k, v in sampling.items() if self.takes_filters or k in _OPENAI_SAMPLING}
        body |= {} if seed is None else {"seed": seed}
        return body | {"n": workload.n} if workload.n > 1 else body

    @classmethod
    def candidates(cls, *, ids: bool) -> Iterator[ServerFeatures]:
        """Yield them from the richest to the poorest."""
        for takes_ids in (True, False) if ids else (False,):
            for extras in _EXTRAS:
                yield cls(takes_ids, extras, takes_filters="ignore_eos" in extras)


@dataclass(slots=True)
class TimedRequest:
    """Hold one request: when it was sent, and what came when."""

    started: float = 0.0
    reads: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Arrival:
    """Describe one request of a load whose requests come at moments of their own."""

    at: float  # seconds since the load began
    prompt: Prompt
    output_len: int


class Target:
    """A server under test."""

    def __init__(self, url: str, model: str, api_key: str = "") -> None:
        self.url = url
        self.model = model
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._transport = AiohttpTransport()

    async def run(
        self,
        workload: Workload,
        prompts: Sequence[Prompt],
        dialect: ServerFeatures,
        on_read: Callable[[bytes], None] = lambda data: None,
        seed: int | None = None,
    ) -> Figures:
        """Run all streams at once, until the last has ended; the i-th draws with `seed` + i, where there is one.

        `on_read` is called with every read, for a progress bar; it must be quick. Raises BenchError.
        """
        bodies = [
            json.dumps(
                dialect.body(self.model, workload, prompt, seed if seed is None else seed + i)
            ).encode()
            for i, prompt in enumerate(prompts)
        ]
        recordings = [TimedRequest() for _ in bodies]
        try:
            await asyncio.gather(
                *(self._record(body, into, on_read) for body, into in zip(bodies, recordings, strict=True))
            )
            traces = [trace for recording in recordings for trace in traces_of(recording, workload)]
        except AttemptFailed as ended:
            raise BenchError(f"{self.url}: {ended.failure.message}") from ended
        return figures(traces, requests=len(recordings))

    async def play(
        self, arrivals: Sequence[Arrival], dialect: ServerFeatures, sampling: str = "greedy"
    ) -> list[RequestTimes]:
        """Send each request at its moment, whether others have ended or not; return their times in the same order.

        Raises BenchError.
        """
        shapes = [Workload(1, len(arrival.prompt), arrival.output_len, sampling) for arrival in arrivals]
        bodies = [
            json.dumps(dialect.body(self.model, shape, arrival.prompt)).encode()
            for shape, arrival in zip(shapes, arrivals, strict=True)
        ]
        recordings = [TimedRequest() for _ in bodies]
        began = time.perf_counter()

        async def send(number: int) -> None:
            await asyncio.sleep(max(0.0, began + arrivals[number].at - time.perf_counter()))
            await self._record(bodies[number], recordings[number])

        try:
            await asyncio.gather(*(send(number) for number in range(len(bodies))))
            return [
                trace
                for recording, shape in zip(recordings, shapes, strict=True)
                for trace in traces_of(recording, shape)
            ]
        except AttemptFailed as ended:
            raise BenchError(f"{self.url}: {ended.failure.message}") from ended

    async def accepts(self, workload: Workload, prompt: Prompt, dialect: ServerFeatures) -> str | None:
        """Return None if the server takes such a request; else why not, in its own words. Raises BenchError."""
        try:
            await self._record(
                json.dumps(dialect.body(self.model, workload, prompt)).encode(), TimedRequest()
            )
        except AttemptFailed as ended:
            if ended.failure.kind == "transport":
                raise BenchError(f"no answer from {self.url} ({ended.failure.message})") from ended
            return ended.failure.message
        return None

    async def get(self, path: str) -> Any:
        """Return the JSON at `path`; None where there is no such route. Raises BenchError without an answer."""
        return await self._json("GET", path, None)

    async def tokenize(self, text: str) -> list[int] | None:
        """Return the ids of `text`, where the server has the route (`prompt` as in vLLM, `content` as in llama.cpp)."""
        answer = await self._json("POST", "/tokenize", {"model": self.model, "prompt": text, "content": text})
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        return ids if isinstance(ids, list) and ids and isinstance(ids[0], int) else None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """Return the answer's JSON; None where there is no such route."""
        raw = None if body is None else json.dumps(body).encode()
        url = self.url.rstrip("/").removesuffix("/v1") + path
        try:
            async with self._transport.request(method, url, self._headers, raw) as reply:
                return await read_json(reply, url) if reply.status == 200 else None
        except AttemptFailed as ended:
            raise BenchError(f"no answer from {self.url} ({ended.failure.message})") from ended

    async def _record(
        self, body: bytes, into: TimedRequest, on_read: Callable[[bytes], None] = lambda data: None
    ) -> None:
        into.started = time.perf_counter()
        url = url_of(self.url, "/v1/completions")
        async with self._transport.request("POST", url, self._headers, body) as reply:
            if reply.status != 200:
                raise AttemptFailed(await failure_of(reply))
            async for data in reply.chunks():
                into.reads.append((time.perf_counter(), data))
                on_read(data)


def traces_of(recording: TimedRequest, workload: Workload) -> list[RequestTimes]:
    """Return a trace for each of the request's choices, read by the SDK's own decoder.

    Raises BenchError when a choice has no tokens or no end, `AttemptFailed` for an error or nonsense in the stream. The
    end is a choice's `finish_reason`, not `[DONE]`: transformers' server never sends that.
    """
    decoder = SSEDecoder()
    times: list[list[float]] = [[] for _ in range(workload.n)]
    ends: dict[int, float] = {}
    usage: Mapping[str, Any] = {}
    for moment, data in recording.reads:
        for chunk in chunks_of(event for event in decoder.feed_data(data) if event != DONE_DATA.encode()):
            usage = chunk.usage if isinstance(chunk.usage, dict) else usage
            for choice in chunk.choices or ():
                if choice.index >= workload.n:
                    raise BenchError(f"a chunk came for choice {choice.index} of {workload.n}")
                if _brings_tokens(choice):
                    times[choice.index].append(moment)
                if choice.finish_reason:
                    ends[choice.index] = moment
    if len(ends) < workload.n:
        raise BenchError("a stream ended before it was done")
    counted = usage.get("completion_tokens")
    if counted:  # a completion whose tokens have no text at all (EOS, half a character) came with its end
        times = [moments or [ends[index]] for index, moments in enumerate(times)]
    if not all(times):
        raise BenchError("a stream brought no tokens for one of its choices")
    # Without usage an event is taken for a token, and the prompt for as long as was asked.
    total = counted or sum(map(len, times))
    prompt_tokens = usage.get("prompt_tokens") or workload.prompt_len
    return [
        RequestTimes(recording.started, tuple(moments), total // workload.n, prompt_tokens)
        for moments in times
    ]


def _brings_tokens(choice: ChoiceChunk) -> bool:
    """Return False for a choice that has a finish reason alone, with which some servers close a stream."""
    return bool(
        choice.text or choice.token_ids or (choice.logprobs is not None and choice.logprobs.entries())
    )
