"""How long a client may take to say what it wants. uvicorn waits for ever, and a thousand slow ones are an outage."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


def impatient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection that has begun no request for so long.

    An answer may take any time. A request's body is `reading`'s to wait for: its connection is in a request already.
    """

    class Impatient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._look_again()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._timer is not None:
                self._timer.cancel()

        def _look_again(self) -> None:
            self._timer = self.loop.call_later(seconds, self._look, self.cycle)

        def _look(self, last: RequestResponseCycle | None) -> None:
            """Close, if since the last look no request has begun and none is being answered."""
            now: Any = self.cycle
            if now is last and (now is None or now.response_complete):
                self.transport.close()
            else:
                self._look_again()

    return Impatient
