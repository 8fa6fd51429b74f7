"""Loads new weights into every server of a sampler: all are asked at once, and all have them when it returns."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from myserve.errors import MyserveError
from myserve.sdk.errors import AttemptFailed, Failure
from myserve.sdk.transport.dialects import FIREWORKS, MYSERVE
from myserve.sdk.transport.pool import root_of
from myserve.sdk.transport.replies import failure_of, read_json

if TYPE_CHECKING:
    from myserve.sdk.transport.pool import ServerPool
    from myserve.wire.weights import Replica, WeightsReport

__all__ = ["WeightUpdateError", "hot_load", "update_weights"]

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
    """Send `POST /v1/weights` to every deployment; return the report of each.

    Asked once: whether to try again is the caller's to decide. Raises WeightUpdateError.
    """

    async def at(url: str) -> Any:
        headers = MYSERVE.headers(backend.api_key)
        report = await _ask(backend, "POST", url, "/v1/weights", headers, body)
        if not isinstance(report, dict):
            raise WeightUpdateError(url, Failure("protocol", f"its report is no object: {str(report)[:200]}"))
        return report

    return await _at_each(backend, at)


async def hot_load(
    backend: ServerPool, headers: Mapping[str, str], body: Mapping[str, Any], timeout: float
) -> list[Replica]:
    """Start Fireworks' hot load at every deployment; return when the snapshot is the current one at each.

    Raises WeightUpdateError, also after `timeout` seconds.
    """
    identity = body["identity"]
    headers = {**FIREWORKS.headers(backend.api_key), **headers}

    async def at(url: str) -> Any:
        deadline = time.monotonic() + timeout
        await _ask(backend, "POST", url, HOT_LOAD, headers, body)
        while True:
            state = await _ask(backend, "GET", url, HOT_LOAD, headers, None)
            replica = _replica(state, url)
            if replica.get("readiness") and replica.get("current_snapshot_identity") == identity:
                return replica
            loading = replica.get("loading_state")
            loading = loading if isinstance(loading, dict) else {}
            if loading.get("stage") == "error" and loading.get("target_snapshot_identity") == identity:
                reason = str(loading.get("error") or "the server does not say why")
                raise WeightUpdateError(url, Failure("refused", reason))
            if time.monotonic() > deadline:
                raise WeightUpdateError(url, Failure("deadline", f"not in place after {timeout:g} s"))
            await asyncio.sleep(POLL)

    return await _at_each(backend, at)


def _replica(state: Any, url: str) -> dict[str, Any]:
    replicas = state.get("replicas") if isinstance(state, dict) else None
    if not isinstance(replicas, list) or not replicas or not isinstance(replicas[0], dict):
        raise WeightUpdateError(url, Failure("protocol", f"its state names no replica: {str(state)[:200]}"))
    return replicas[0]


async def _at_each(backend: ServerPool, at: Any) -> list[Any]:
    """Ask all, to their end, so that none is left half way unseen; then raise the first failure, if there is one."""
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
    sent = {"content-type": "application/json", **headers}
    raw = None if body is None else json.dumps(body).encode()
    try:
        async with backend.transport.request(method, url + path, sent, raw) as reply:
            if reply.status != 200:
                raise AttemptFailed(await failure_of(reply))
            return await read_json(reply, url + path)
    except AttemptFailed as failed:
        raise WeightUpdateError(url, failed.failure) from failed
