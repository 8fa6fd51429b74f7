"""Frames between two processes of a fleet, over TCP: the one that connects shows the fleet's secret first.

Not Ray's calls: a replica sends one frame for all that a step brought, at 20 µs where a streamed call of Ray costs a
millisecond for each token, and a killed process closes its socket at once.
"""

from __future__ import annotations

import asyncio
import hmac
import pickle
from collections.abc import Callable
from enum import IntEnum
from typing import Any, cast

from myserve.errors import EngineError, MyserveError

__all__ = ["Channel", "Kind", "error_from", "error_to", "pack", "unpack"]

HEAD = 5  # bytes: four of the length, one of the kind
MOST_BYTES = 1 << 30  # of one frame


class Kind(IntEnum):
    """The content of a frame."""

    HELLO = 0  # the secret, from the side that connects
    SUBMIT = 1  # a request
    ABORT = 2  # choices of a request that nobody waits for
    CALL = 3  # of a method of the replica
    REPLY = 4
    OUTCOMES = 5  # what a step brought
    PING = 6
    STATUS = 7  # the answer to HELLO and PING
    LEAVING = 8  # the replica takes no more requests


class Channel(asyncio.Protocol):
    """One end of a connection. Used on its event loop alone.

    `on_frame` gets each frame, `on_lost` is called once when the connection is over. With `expects` the other side must
    show this secret before anything else of it is read.
    """

    def __init__(
        self,
        on_frame: Callable[[Channel, Kind, bytes], None],
        on_lost: Callable[[Channel], None],
        *,
        expects: str | None = None,
    ) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._expects = expects
        self._read = bytearray()
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self.last_heard = 0.0  # on the loop's clock

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's, which Ray brings, are no asyncio.Transport
        self._transport = cast("asyncio.Transport", transport)
        self.last_heard = asyncio.get_running_loop().time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        """Cut what came into frames."""
        self.last_heard = asyncio.get_running_loop().time()
        self._read += data
        at, view = 0, self._read
        while len(view) - at >= HEAD:
            length = int.from_bytes(view[at : at + 4], "big")
            if length > (MOST_BYTES if self._expects is None else 1024):
                self.close()
                return
            if len(view) - at - HEAD < length:
                break
            kind, body = Kind(view[at + 4]), bytes(view[at + HEAD : at + HEAD + length])
            at += HEAD + length
            if self._expects is not None:
                if kind != Kind.HELLO or not hmac.compare_digest(body, self._expects.encode()):
                    self.close()
                    return
                self._expects = None
            self._on_frame(self, kind, body)
        del self._read[:at]

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """Send a frame; nothing where the connection is over. All of one turn of the loop is one write."""
        if self._transport is None:
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += (len(body).to_bytes(4, "big"), bytes((kind,)), body)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None:
            self._transport.write(b"".join(unsent))

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    def close(self) -> None:
        """End the connection at once; `on_lost` follows."""
        if self._transport is not None:
            self._transport.abort()


def pack(value: Any) -> bytes:
    """Return a value as bytes. Both sides are this package, and have shown that they know the fleet's secret."""
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def unpack(body: bytes) -> Any:
    return pickle.loads(body)


def error_to(error: BaseException) -> bytes:
    """Return an error as bytes: ours as they are, of others their words.

    >>> error_from(error_to(KeyError("a")))
    EngineError("KeyError: 'a'")
    """
    if not isinstance(error, MyserveError):
        error = EngineError(f"{type(error).__name__}: {error}")
    # not as pickle does it: some of ours cannot be called with their `args` alone
    return pack((type(error), error.args, vars(error)))


def error_from(body: bytes) -> MyserveError:
    """Return the error that `error_to` was given."""
    kind, args, fields = unpack(body)
    error: MyserveError = kind.__new__(kind, *args)
    vars(error).update(fields)
    return error
