"""The servers behind a sampler: one request out, events back, failures in the server's own words."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from myserve.sdk.concurrency.controllers import FixedConcurrencyController
from myserve.sdk.concurrency.semaphore import Permit, ResizableSemaphore
from myserve.sdk.errors import AttemptFailed
from myserve.sdk.retry import RetryPolicy, retrying
from myserve.sdk.transport.deployments import Deployment, choose
from myserve.sdk.transport.dialects import FIREWORKS, MYSERVE, Dialect, detect
from myserve.sdk.transport.http import Reply, Transport
from myserve.sdk.transport.replies import events_of, failure_of, read_json
from myserve.sdk.types import SamplerStats
from myserve.wire.perf_metrics import PerfMetrics

__all__ = ["ServerPool", "new_request_id", "root_of", "url_of"]


@dataclass(slots=True)
class ServerPool:
    """Hold the deployments, how to reach them, and what limits and counts the traffic to them.

    `stall_timeout`: seconds without a token after which a stream counts as dead.
    """

    deployments: list[Deployment]
    transport: Transport
    api_key: str
    retry: RetryPolicy
    stall_timeout: float = 300.0
    controller: FixedConcurrencyController | None = None
    fixed_dialect: Dialect | None = None
    stats: SamplerStats = field(default_factory=SamplerStats)
    semaphore: ResizableSemaphore = field(init=False)

    def __post_init__(self) -> None:
        self.semaphore = (
            self.controller.semaphore if self.controller is not None else ResizableSemaphore(None)
        )

    async def dialect(self) -> Dialect:
        """Return what the servers speak: asked once, with `GET /version`; all deployments are taken to be alike."""
        if self.fixed_dialect is None:
            # Three tries: were a passing fault taken for "no such route", samples would get other seeds.
            try:
                version = await retrying(replace(self.retry, max_attempts=3), self._version)
            except AttemptFailed as ended:
                if ended.failure.kind == "transport":
                    return FIREWORKS  # unknown still: the samples' own retries will tell what is wrong
                version = None
            self.fixed_dialect = detect(version)
        return self.fixed_dialect

    async def _version(self) -> object:
        url = root_of(choose(self.deployments, (), time.monotonic()).url) + "/version"
        async with self.transport.request("GET", url, MYSERVE.headers(self.api_key), None) as reply:
            if reply.status == 200:
                return await read_json(reply, url)
            failure = await failure_of(reply)
            if failure.retryable:
                raise AttemptFailed(failure)
            return None

    @asynccontextmanager
    async def stream(
        self,
        dialect: Dialect,
        body: Mapping[str, Any],
        request_id: str,
        prompt: Sequence[int],
        max_bytes: int,
    ) -> AsyncIterator[AsyncIterator[list[bytes]]]:
        """Post one request and give its events, `max_bytes` at most. However that ends early, it is `AttemptFailed`."""
        deployment = choose(self.deployments, prompt, time.monotonic())
        url = url_of(deployment.url, dialect.path)
        headers = {**dialect.headers(self.api_key), "x-request-id": request_id}
        async with self._posted(deployment, url, headers, body, body["n"]) as reply:
            yield events_of(reply, max_bytes)

    async def post(self, path: str, body: Mapping[str, Any], *, about: bytes) -> Any:
        """Post one request and return its JSON. Requests `about` the same go to the same server, where it has time.

        However that ends, it is `AttemptFailed`.
        """
        key = list(hashlib.blake2b(about, digest_size=16).digest())
        deployment = choose(self.deployments, key, time.monotonic())
        url = root_of(deployment.url) + path
        async with self._posted(deployment, url, MYSERVE.headers(self.api_key), body, 1) as reply:
            return await read_json(reply, url)

    @asynccontextmanager
    async def _posted(
        self,
        deployment: Deployment,
        url: str,
        headers: Mapping[str, str],
        body: Mapping[str, Any],
        samples: int,
    ) -> AsyncIterator[Reply]:
        """Post a body and give the reply, counted with the deployment's load and failures."""
        deployment.in_flight += samples
        self.stats.requests += 1
        sent = {**headers, "content-type": "application/json"}
        try:
            async with self.transport.request("POST", url, sent, orjson.dumps(body)) as reply:
                if reply.status != 200:
                    raise AttemptFailed(await failure_of(reply))
                yield reply
            deployment.succeeded()
        except AttemptFailed as ended:
            if ended.failure.kind in ("transport", "server", "busy"):
                deployment.failed(time.monotonic())
            raise
        finally:
            deployment.in_flight -= samples

    def observe(self, metrics: PerfMetrics, samples: int, permit: Permit) -> None:
        """Tell the controller what an answered request cost."""
        if self.controller is not None:
            self.controller.observe(metrics, samples=samples, limit_version=permit.limit_version)

    def refused(self, permit: Permit) -> None:
        """Tell the controller of a 429 or a 503."""
        if self.controller is not None:
            self.controller.refused(limit_version=permit.limit_version)


def root_of(url: str) -> str:
    """Return the server's root, for users who pass OpenAI's base URL.

    >>> root_of("http://localhost:8000/v1/")
    'http://localhost:8000'
    """
    return url.rstrip("/").removesuffix("/v1").removesuffix("/inference")


def url_of(url: str, path: str) -> str:
    """Return where to post: `path` under the root; under `/v1` itself if that is what the user named.

    >>> url_of("http://localhost:8000", "/inference/v1/completions")
    'http://localhost:8000/inference/v1/completions'
    >>> url_of("http://localhost:8000/v1", "/inference/v1/completions")
    'http://localhost:8000/v1/completions'
    """
    stem = url.rstrip("/")
    return f"{stem}/completions" if stem.endswith("/v1") else stem + path


def new_request_id() -> str:
    """Return a request id that no other request has."""
    return f"req-{secrets.token_hex(12)}"
