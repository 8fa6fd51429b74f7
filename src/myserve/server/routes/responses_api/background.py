"""Responses that go on after their request was answered, and the events of those that were asked for as streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from myserve.server.answers.bursts import bursts_of
from myserve.server.answers.respond import Begun
from myserve.server.errors import status_of
from myserve.server.observe import traces
from myserve.server.routes.responses_api.store import ResponseStore
from myserve.server.routes.responses_api.writer import ResponseWriter
from myserve.wire.responses_api.answer import ResponseObject, ResponseStatus

__all__ = ["BackgroundRun", "BackgroundRuns"]

log = logging.getLogger("myserve.server")


@dataclass(slots=True, eq=False)
class BackgroundRun:
    """One response while it is made. `events` are framed, one by one."""

    begun: Begun
    writer: ResponseWriter
    has_events: bool
    events: list[bytes] = field(default_factory=list)
    grew: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def body(self, status: ResponseStatus = "in_progress") -> ResponseObject:
        """Return the response so far: its output is there when it has ended."""
        return self.writer.unfinished(status)

    async def cancel(self) -> None:
        """End it with what it has, and wait for that."""
        self.begun.generation.abort_requests(None)
        if self.task is not None:
            await asyncio.wait({self.task})

    async def bursts(self, after: int) -> AsyncGenerator[bytes, None]:
        """Yield the events behind number `after`, those that are there and those that come."""
        at = after + 1
        while self.task is not None:
            is_over = self.task.done()
            if len(self.events) > at:
                yield b"".join(self.events[at:])
                at = len(self.events)
            if is_over:
                return
            self.grew.clear()
            await self.grew.wait()


class BackgroundRuns:
    """The responses that are made in the background, by owner and id; what has ended is in the store."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._runs: dict[tuple[str, str], BackgroundRun] = {}

    def start(self, owner: str, begun: Begun, writer: ResponseWriter, *, has_events: bool) -> BackgroundRun:
        """Go on with a response whose draws have begun."""
        run = BackgroundRun(begun, writer, has_events)
        self._runs[owner, begun.answer.id] = run
        run.task = asyncio.create_task(self._make(run))
        run.task.add_done_callback(lambda _: self._ended(owner, run))
        return run

    def get(self, owner: str, response_id: str) -> BackgroundRun | None:
        """Return a run of this owner, if it goes on."""
        return self._runs.get((owner, response_id))

    def close(self) -> None:
        """Stop all."""
        for run in list(self._runs.values()):
            if run.task is not None:
                run.task.cancel()

    async def _make(self, run: BackgroundRun) -> None:
        # the request whose trace it was has been answered
        traces.follow(None)
        answer, writer, generation = run.begun
        try:
            async with aclosing(bursts_of(answer, writer, generation)) as bursts:
                async for burst in bursts:
                    self._add(run, burst)
        except Exception as error:
            if status_of(error) >= 500:
                log.error("a response in the background failed", exc_info=error)
            self._add(run, run.writer.failed(error))
        finally:
            generation.abort()

    @staticmethod
    def _add(run: BackgroundRun, burst: bytes) -> None:
        if run.has_events:
            run.events += [event + b"\n\n" for event in burst.split(b"\n\n") if event]
            run.grew.set()

    def _ended(self, owner: str, run: BackgroundRun) -> None:
        self._runs.pop((owner, run.begun.answer.id), None)
        run.grew.set()
        # to read its error keeps asyncio from reporting it as unread
        with suppress(asyncio.CancelledError):
            if run.task is not None:
                run.task.result()
        if run.writer.kept is not None:
            self._store.put(owner, replace(run.writer.kept, events=tuple(run.events)))
