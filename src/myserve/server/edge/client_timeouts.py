"""How long a client may take to say what it wants, and to take its answer. uvicorn waits for ever, and a thousand slow
ones are an outage."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

MIN_PROGRESS_BYTES = 64 << 10  # bytes


def timeout_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection that has begun no request for so long, and cuts one that took less
    than 64 KiB of the answer waiting for it.

    An answer may take any time to be made. A request's body is `reading`'s to wait for: its connection is in a
    request already.
    """

    class Impatient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._look_again()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._timer, self._stall):
                if timer is not None:
                    timer.cancel()

        def pause_writing(self) -> None:
            """The client is behind: nothing more is written until it has taken most of what waits."""
            super().pause_writing()
            self._watch_it_take()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stall is not None:
                self._stall.cancel()

        def _watch_it_take(self) -> None:
            left = self.transport.get_write_buffer_size()
            self._stall = self.loop.call_later(seconds, self._cut_if_stalled, left)

        def _cut_if_stalled(self, left_then: int) -> None:
            if left_then - self.transport.get_write_buffer_size() < MIN_PROGRESS_BYTES:
                self.transport.abort()  # `close` would wait for the rest to be taken
            else:
                self._watch_it_take()

        def _look_again(self) -> None:
            self._timer = self.loop.call_later(seconds, self._look, self.cycle)

        def _look(self, last: RequestResponseCycle | None) -> None:
            """Close, if since the last look no request has begun and none is being answered."""
            now: Any = self.cycle
            if now is last and (now is None or now.response_complete):
                self.transport.close()
                # for an answer that nobody takes
                self._stall = self.loop.call_later(seconds, self.transport.abort)
            else:
                self._look_again()

    return Impatient
