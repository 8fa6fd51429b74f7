"""New weights for the servers that a sampler samples from: asked of all at once, in place at all when it returns."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from myserve.errors import MyserveError
from myserve.sdk.errors import AttemptFailed, Failure
from myserve.sdk.transport.pool import root_of
from myserve.sdk.transport.replies import failure_of, read_all

if TYPE_CHECKING:
    from myserve.sdk.transport.pool import ServerPool
    from myserve.wire.weights import Replica, WeightsReport

HOT_LOAD = "/hot_load/v1/models/hot_load"
POLL = 0.1  # seconds between two looks at a hot load


class WeightUpdateError(MyserveError, RuntimeError):
    """A server did not take the new weights, and goes on with its old ones. `url` says which, `status` and the message
    why. With several servers the others may have taken them: `weight_version` of the samples says who drew them."""

    def __init__(self, url: str, failure: Failure) -> None:
        status = "" if failure.status is None else f"HTTP {failure.status}: "
        super().__init__(f"{url}: the weights were not updated: {status}{failure.message}")
        self.url = url
        self.status = failure.status
        self.server_message = failure.message


async def update_weights(backend: ServerPool, body: Mapping[str, Any]) -> list[WeightsReport]:
    """`POST /v1/weights` at every deployment; a report each. Never asked twice: it is the caller's to decide."""

    async def at(url: str) -> Any:
        return await _ask(backend, "POST", url, "/v1/weights", {}, body)

    return await _at_each(backend, at)


async def hot_load(
    backend: ServerPool, headers: Mapping[str, str], body: Mapping[str, Any], timeout: float
) -> list[Replica]:
    """Fireworks' hot load at every deployment, until the snapshot is the current one there."""
    identity = body["identity"]

    async def at(url: str) -> Any:
        deadline = time.monotonic() + timeout
        await _ask(backend, "POST", url, HOT_LOAD, headers, body)
        while True:
            state = await _ask(backend, "GET", url, HOT_LOAD, headers, None)
            (replica, *_) = state["replicas"]
            loading = replica.get("loading_state", {})
            if replica["readiness"] and replica["current_snapshot_identity"] == identity:
                return replica
            if loading.get("stage") == "error" and loading.get("target_snapshot_identity") == identity:
                reason = str(loading.get("error") or "the server does not say why")
                raise WeightUpdateError(url, Failure("refused", reason))
            if time.monotonic() > deadline:
                raise WeightUpdateError(url, Failure("deadline", f"not in place after {timeout:g} s"))
            await asyncio.sleep(POLL)

    return await _at_each(backend, at)


async def _at_each(backend: ServerPool, at: Any) -> list[Any]:
    """All to their end, so that none is left half way unseen; then the first failure, if there is one."""
    urls = [root_of(deployment.url) for deployment in backend.deployments]
    ended = await asyncio.gather(*(at(url) for url in urls), return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, BaseException):
            raise outcome
    return list(ended)


async def _ask(
    backend: ServerPool,
    method: Literal["GET", "POST"],
    url: str,
    path: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any] | None,
) -> Any:
    sent = {**backend.headers, "content-type": "application/json", **headers}
    raw = None if body is None else json.dumps(body).encode()
    try:
        async with backend.transport.request(method, url + path, sent, raw) as reply:
            if reply.status != 200:
                raise AttemptFailed(await failure_of(reply))
            return json.loads(await read_all(reply))
    except AttemptFailed as failed:
        raise WeightUpdateError(url, failed.failure) from failed
