"""The servers as a group sees them: one request out, chunks back, failures in the server's own words."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from myserve.sdk.concurrency.controllers import FixedConcurrencyController
from myserve.sdk.concurrency.gate import Gate, Permit
from myserve.sdk.errors import AttemptFailed, Failure
from myserve.sdk.retry import RetryPolicy, retrying
from myserve.sdk.transport.deployments import Deployment, choose
from myserve.sdk.transport.dialects import FIREWORKS, Dialect, detect
from myserve.sdk.transport.http import Transport
from myserve.sdk.transport.replies import events_of, failure_of, read_all
from myserve.sdk.types import SamplerStats
from myserve.wire.perf_metrics import PerfMetrics


@dataclass(slots=True)
class ServerPool:
    """The deployments, how to reach them, and what limits and counts the traffic to them."""

    deployments: list[Deployment]
    transport: Transport
    headers: Mapping[str, str]
    retry: RetryPolicy
    controller: FixedConcurrencyController | None = None
    fixed_dialect: Dialect | None = None
    stats: SamplerStats = field(default_factory=SamplerStats)
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.gate = self.controller.gate if self.controller is not None else Gate(None)

    async def dialect(self) -> Dialect:
        """What the servers speak: asked once, with `GET /version`; all deployments are taken to be alike."""
        if self.fixed_dialect is None:
            asked: list[object] = []

            async def ask() -> None:
                asked.append(await self._version())

            # Three tries: were a passing fault taken for "no such route", samples would get other seeds.
            failed = await retrying(replace(self.retry, max_attempts=3), ask, lambda: 0)
            if failed is not None and failed[0].kind == "transport":
                return FIREWORKS  # unknown still: the samples' own retries will tell what is wrong
            self.fixed_dialect = detect(asked[0] if asked else None)
        return self.fixed_dialect

    async def _version(self) -> object:
        url = root_of(choose(self.deployments, (), time.monotonic()).url) + "/version"
        async with self.transport.request("GET", url, self.headers, None) as reply:
            if reply.status == 200:
                try:
                    return json.loads(await read_all(reply))
                except ValueError as error:
                    raise AttemptFailed(Failure("protocol", f"{url} gave no JSON: {error}")) from error
            failure = await failure_of(reply)
            if failure.retryable:
                raise AttemptFailed(failure)
            return None

    @asynccontextmanager
    async def stream(
        self, path: str, body: Mapping[str, Any], request_id: str, prompt: Sequence[int], samples: int
    ) -> AsyncIterator[AsyncIterator[list[bytes]]]:
        """Posts one request and gives its events. However that ends early, it is `AttemptFailed`."""
        deployment = choose(self.deployments, prompt, time.monotonic())
        deployment.in_flight += samples
        self.stats.requests += 1
        headers = {**self.headers, "content-type": "application/json", "x-request-id": request_id}
        raw = orjson.dumps(body)
        try:
            url = url_of(deployment.url, path)
            async with self.transport.request("POST", url, headers, raw) as reply:
                if reply.status != 200:
                    raise AttemptFailed(await failure_of(reply))
                yield events_of(reply)
            deployment.succeeded()
        except AttemptFailed as ended:
            if ended.failure.kind in ("transport", "server", "busy"):
                deployment.failed(time.monotonic())
            raise
        finally:
            deployment.in_flight -= samples

    def observe(self, metrics: PerfMetrics, samples: int, permit: Permit) -> None:
        if self.controller is not None:
            self.controller.observe(metrics, samples=samples, epoch=permit.epoch)

    def refused(self, permit: Permit) -> None:
        if self.controller is not None:
            self.controller.refused(epoch=permit.epoch)


def root_of(url: str) -> str:
    """The server's root, for users who pass OpenAI's base URL.

    >>> root_of("http://localhost:8000/v1/")
    'http://localhost:8000'
    """
    return url.rstrip("/").removesuffix("/v1").removesuffix("/inference")


def url_of(url: str, path: str) -> str:
    """Where to post: `path` under the root; under `/v1` itself if that is what the user named.

    >>> url_of("http://localhost:8000", "/inference/v1/completions")
    'http://localhost:8000/inference/v1/completions'
    >>> url_of("http://localhost:8000/v1", "/inference/v1/completions")
    'http://localhost:8000/v1/completions'
    """
    stem = url.rstrip("/")
    return f"{stem}/completions" if stem.endswith("/v1") else stem + path


def new_request_id() -> str:
    return f"req-{secrets.token_hex(12)}"
