"""Generations that go on after their request was answered, and their results until they are fetched; bounded."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from myserve.errors import OverloadedError, RequestError
from myserve.server.answers.generation import Generation
from myserve.server.answers.respond import Begun
from myserve.server.observe import traces

__all__ = ["Promise", "Promises"]

# how long a promise is kept that nobody asks for: a client asks again within 30 s, whatever its connection does
UNASKED_SECONDS = 300.0
MOST_PROMISES = 65_536
MOST_BYTES = 256 << 20  # of results

Begin = Coroutine[Any, Any, Begun]
Write = Callable[[Begun], Coroutine[Any, Any, bytes]]


@dataclass(slots=True, eq=False)
class Promise:
    """One request's draws, as they begin and as they end. `result` raises what they failed with."""

    request_id: str
    owner: str
    digest: bytes  # of the request's body
    begun: asyncio.Task[Begun]
    result: asyncio.Task[bytes]
    num_waiting: int = 0
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    async def generation(self) -> Generation:
        """Return the draws once they run. Raises what kept them from it."""
        return (await asyncio.shield(self.begun)).generation


class Promises:
    """The promises of one server by their ids; each is its owner's alone. Used on the event loop alone.

    One that nobody asks for in `UNASKED_SECONDS` is stopped and forgotten. Results may have `MOST_BYTES` together: what
    was fetched once goes first, and while the rest fills it, no more are made.
    """

    def __init__(self) -> None:
        self._held: dict[str, Promise] = {}
        self._fetched: dict[str, None] = {}  # the ids of these, the oldest first
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, request_id: str, owner: str) -> Promise | None:
        """Return a promise, if it is there and `owner`'s."""
        promise = self._held.get(request_id)
        return promise if promise is not None and promise.owner == owner else None

    def make(self, request_id: str, owner: str, digest: bytes, begin: Begin, write: Write) -> Promise:
        """Begin the draws and promise their result; a request that is sent again has the promise it had.

        Raises RequestError where the id is that of another request, OverloadedError where there is no room.
        """
        if (promise := self._held.get(request_id)) is not None:
            begin.close()
            if promise.owner != owner or not hmac.compare_digest(promise.digest, digest):
                raise RequestError("seq_id was used for another request of this session", param="seq_id")
            return promise
        try:
            self._check_room()
        except OverloadedError:
            begin.close()
            raise
        begun = asyncio.create_task(begin)
        result = asyncio.create_task(_result(begun, write))
        promise = self._held[request_id] = Promise(request_id, owner, digest, begun, result)
        result.add_done_callback(lambda _: self._ended(promise))
        self._wait_for_somebody(promise)
        return promise

    async def fetch(self, promise: Promise, seconds: float) -> bytes | None:
        """Return the result, or None if it is not there after `seconds`. Raises what the draws failed with."""
        promise.num_waiting += 1
        if promise.timer is not None:
            promise.timer.cancel()
        try:
            done, _ = await asyncio.wait({promise.result}, timeout=seconds)
        finally:
            promise.num_waiting -= 1
            if promise.num_waiting == 0 and promise.request_id in self._held:
                self._wait_for_somebody(promise)
        if not done:
            return None
        self._fetched[promise.request_id] = None
        self._make_room()
        return promise.result.result()

    def forget(self, promise: Promise) -> None:
        """Stop what runs, and drop the result. Idempotent."""
        if self._held.get(promise.request_id) is not promise:
            return
        del self._held[promise.request_id]
        self._fetched.pop(promise.request_id, None)
        if promise.timer is not None:
            promise.timer.cancel()
        self._num_bytes -= _size(promise)
        for task in (promise.result, promise.begun):
            task.cancel()
        # a result that was stopped before its first step had nothing of its own to stop
        if not promise.begun.cancelled() and promise.begun.done() and promise.begun.exception() is None:
            promise.begun.result().generation.abort()

    def close(self) -> None:
        """Forget all."""
        for promise in list(self._held.values()):
            self.forget(promise)

    def _wait_for_somebody(self, promise: Promise) -> None:
        loop = asyncio.get_running_loop()
        promise.timer = loop.call_later(UNASKED_SECONDS, self.forget, promise)

    def _ended(self, promise: Promise) -> None:
        if self._held.get(promise.request_id) is promise:
            self._num_bytes += _size(promise)
            self._make_room()

    def _make_room(self) -> None:
        while self._fetched and self._is_full:
            self.forget(self._held[next(iter(self._fetched))])

    def _check_room(self) -> None:
        self._make_room()
        if self._is_full:
            raise OverloadedError(
                "the results that wait to be fetched leave no room for more; fetch them first",
                retry_after=1.0,
            )

    @property
    def _is_full(self) -> bool:
        return len(self._held) >= MOST_PROMISES or self._num_bytes >= MOST_BYTES


async def _result(begun: asyncio.Task[Begun], write: Write) -> bytes:
    # the request whose trace it was has been answered
    traces.follow(None)
    return await write(await begun)


def _size(promise: Promise) -> int:
    """Return the bytes of a result; reading its error, if it has one, keeps asyncio from reporting it as unread."""
    result = promise.result
    if not result.done() or result.cancelled() or result.exception() is not None:
        return 0
    return len(result.result())
