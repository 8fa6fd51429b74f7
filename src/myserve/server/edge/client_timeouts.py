"""A client has a bounded time to send a request's head and to take its answer: uvicorn waits for ever, and a thousand
slow clients are an outage.

This builds on uvicorn's H11Protocol, which is not its public API: pyproject.toml bounds uvicorn's version, and
tests/server/edge/test_uvicorn_private.py names what is used of it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from myserve.server.answers.streaming import CONNECTION
from myserve.server.errors import http_error_body

__all__ = ["ClientTimeoutProtocol", "timeout_protocol"]

MIN_PROGRESS_BYTES = 64 << 10


class ClientTimeoutProtocol(H11Protocol):
    """Closes a connection that begins no request in `timeout` seconds, or takes under 64 KiB of a waiting answer in it.

    An answer may take any time to be made. A request's body is waited for in `routes/body.py`: its connection is in a
    request already.
    """

    timeout: ClassVar[float]

    _idle_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin to wait for the first request."""
        super().connection_made(transport)
        # requests get a copy of it: `EventStream` finds us there
        self.app_state = {**self.app_state, CONNECTION: self}
        self._watch_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timers."""
        super().connection_lost(exc)
        for timer in (self._idle_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    def write_body(self, part: bytes) -> bool:
        """Write a part of the running answer's body at once; False where ASGI's `send` must do it.

        That is where the client is behind or gone, and where the body is not sent in chunks: to HTTP/1.0, or for HEAD.
        An empty part is not written: an empty chunk would end the body, and what follows it would be read as the next
        answer.
        """
        if not part:
            return True
        cycle = self.cycle
        if (
            self.flow.write_paused
            or cycle.disconnected
            or self.conn.our_state is not h11.SEND_BODY
            or self.scope["http_version"] != "1.1"
            or self.scope["method"] == "HEAD"
        ):
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True

    def pause_writing(self) -> None:
        """Watch a client that is behind: nothing more is written until it has taken most of what waits."""
        super().pause_writing()
        self._watch_progress()

    def resume_writing(self) -> None:
        """End the watch."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the shape of every other error; in the middle of an answer, only close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps(http_error_body(400, msg)).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_progress(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self.timeout, self._cut_if_stalled, left)

    def _cut_if_stalled(self, left_then: int) -> None:
        if left_then - self.transport.get_write_buffer_size() < MIN_PROGRESS_BYTES:
            # `close` would wait for the rest to be taken
            self.transport.abort()
        else:
            self._watch_progress()

    def _watch_for_request(self) -> None:
        self._idle_timer = self.loop.call_later(self.timeout, self._close_if_idle, self.cycle)

    def _close_if_idle(self, last: RequestResponseCycle | None) -> None:
        """Close, if since the last look no request has begun and none is being answered."""
        now: Any = self.cycle
        if now is last and (now is None or now.response_complete):
            self.transport.close()
            # for an answer that is not taken
            self._stall_timer = self.loop.call_later(self.timeout, self.transport.abort)
        else:
            self._watch_for_request()


def timeout_protocol(seconds: float) -> type[ClientTimeoutProtocol]:
    """Return the protocol with its timeout; uvicorn makes its own objects, one for each connection."""
    return type("TimeoutProtocol", (ClientTimeoutProtocol,), {"timeout": seconds})
