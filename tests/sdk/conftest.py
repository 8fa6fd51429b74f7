"""A real server on a socket that speaks Fireworks' event stream, and breaks it on request."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvicorn
from aiohttp import web

from myserve.sdk import DeploymentSampler, RetryPolicy
from myserve.sdk.testing import NextToken, ToyTokenizer, fake_events, tiny_model
from myserve.server.app import create_app
from myserve.server.settings import Settings
from myserve.wire.sse import DONE, encode_event

QUICK = RetryPolicy(max_attempts=6, first_pause=0.01, longest_pause=0.05)


@dataclass
class Fault:
    """What goes wrong with one request: a status, or something in its stream after `after` events."""

    status: int | None = None
    message: str = "no"
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None
    cut: bool = False  # the connection is reset
    hangs: bool = False  # nothing comes at all
    garbage: bool = False
    error_event: bool = False
    edit: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None  # rewrites, or drops, each chunk


@dataclass
class StubServer:
    """`faults` are used up in the order of the requests; None is a good answer."""

    next_token: NextToken = field(default_factory=tiny_model)
    version: dict[str, Any] | None = field(
        default_factory=lambda: {"name": "myserve", "extensions": ["sample_index", "num_prior_tokens"]}
    )
    faults: list[Fault | None] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    peak_samples: int = 0
    aborted: int = 0
    pause: float = 0.0  # seconds between events
    byte_by_byte: bool = False
    metrics: Callable[[], dict[str, float]] | None = None
    url: str = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/version", self._version)
        for path in ("/inference/v1/completions", "/v1/completions"):
            app.router.add_post(path, self._complete)
        return app

    async def _version(self, request: web.Request) -> web.Response:
        if self.version is None:
            raise web.HTTPNotFound()
        return web.json_response(self.version)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None and fault.status is not None:
            error = {"error": {"message": fault.message, "type": "stub", "param": None, "code": None}}
            return web.json_response(error, status=fault.status, headers=fault.headers)
        if fault is not None and fault.hangs:
            await asyncio.sleep(60)
        left = [body["n"]]  # a choice is in flight until its finish reason
        self.in_flight += body["n"]
        self.peak_samples = max(self.peak_samples, self.in_flight)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            await response.prepare(request)
            await self._write(request, response, self._events(body, left), fault)
            await response.write_eof()
        except (ConnectionError, asyncio.CancelledError):
            self.aborted += 1
            raise
        finally:
            self.in_flight -= left[0]
        return response

    def _events(self, body: dict[str, Any], left: list[int]) -> Iterable[bytes]:
        next_token = self.next_token
        # vLLM: sample i draws with seed + i
        if self.version is not None and "extensions" not in self.version:
            next_token = lambda prompt, ids, seed, i: self.next_token(prompt, ids, seed + i, 0)  # noqa: E731
        for event in fake_events(body, next_token):
            if b'"finish_reason"' in event:
                self.in_flight -= 1
                left[0] -= 1
            if self.metrics is not None and b"perf_metrics" in event:
                event = encode_event(json.dumps({"choices": [], "perf_metrics": self.metrics()}))
            yield event

    async def _write(
        self, request: web.Request, response: web.StreamResponse, events: Iterable[bytes], fault: Fault | None
    ) -> None:
        for count, event in enumerate(events):
            if fault is not None and fault.after == count:
                if fault.cut:
                    assert request.transport is not None
                    request.transport.abort()
                    raise ConnectionResetError
                if fault.error_event:
                    await response.write(encode_event('{"error": {"message": "the engine died"}}', "error"))
                    return
                if fault.garbage:
                    await response.write(b"data: {not json\n\n")
                    return
            if fault is not None and fault.edit is not None and event != DONE:
                chunk = fault.edit(json.loads(event[6:]))
                if chunk is None:
                    continue
                event = encode_event(json.dumps(chunk))
            for piece in (event[i : i + 1] for i in range(len(event))) if self.byte_by_byte else (event,):
                await response.write(piece)
            if self.pause:
                await asyncio.sleep(self.pause)


async def _run(stub: StubServer) -> web.AppRunner:
    runner = web.AppRunner(stub.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    return runner


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[StubServer]:
    server = StubServer()
    runner = await _run(server)
    yield server
    await runner.cleanup()


@pytest_asyncio.fixture
async def other_stub() -> AsyncIterator[StubServer]:
    server = StubServer()
    runner = await _run(server)
    yield server
    await runner.cleanup()


@pytest.fixture
def make_sampler(stub: StubServer) -> Callable[..., DeploymentSampler]:
    """A sampler on the stub, with quick retries; keyword arguments go to its constructor."""

    def make(**options: Any) -> DeploymentSampler:
        options = {
            "inference_url": stub.url,
            "model": "toy",
            "tokenizer": ToyTokenizer(),
            "retry": QUICK,
            **options,
        }
        return DeploymentSampler(**options)

    return make


@pytest.fixture
def fault() -> type[Fault]:
    return Fault


@pytest.fixture(scope="session")
def server_url(tiny_model: Callable[[str], Path]) -> Iterator[str]:
    served = {"tiny": "qwen3", "moe": "mixtral", "wide": "wide_moe"}
    app = create_app(Settings(models={name: str(tiny_model(arch)) for name, arch in served.items()}))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while set(app.state.models.readiness().values()) != {"ready"}:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()
