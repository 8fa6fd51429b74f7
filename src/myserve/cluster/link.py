"""A connection to one replica, of an ingress or the controller: a replica that is silent too long is lost."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from myserve.cluster.channel import Channel, Kind, error_from, pack, unpack
from myserve.cluster.messages import Entry, Member, ReplicaStatus, read_entries
from myserve.errors import EngineDeadError

__all__ = ["Link", "LinkOwner"]

PING_SECONDS = 1.0
# A replica that says nothing for so long hangs: its loop does nothing but pass frames on.
HANG_SECONDS = 10.0
CONNECT_SECONDS = 5.0


class LinkOwner(Protocol):
    """Is told of a link's life, on its event loop."""

    def on_entries(self, link: Link, entries: list[Entry]) -> None: ...
    def on_status(self, link: Link) -> None: ...
    def on_leaving(self, link: Link) -> None: ...
    def on_lost(self, link: Link) -> None: ...


class Link:
    """One end of a channel to `member`. Used on its event loop alone."""

    def __init__(self, member: Member, secret: str, owner: LinkOwner) -> None:
        self.member = member
        self.status: ReplicaStatus | None = None
        self.is_leaving = False
        self._owner = owner
        self._secret = secret
        self._channel: Channel | None = None
        self._ready: asyncio.Future[None] | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._pinging: asyncio.Task[None] | None = None
        self.hang_seconds = HANG_SECONDS

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def is_open(self) -> bool:
        """True from the replica's first status on, until the connection is over."""
        return self.status is not None and self._channel is not None and self._channel.is_open

    async def open(self) -> None:
        """Connect and wait for the replica's first status. Raises EngineDeadError."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, channel = await loop.create_connection(
                    lambda: Channel(self._on_frame, self._on_lost), self.member.host, self.member.port
                )
                self._channel = channel
                channel.send(Kind.HELLO, self._secret.encode())
                await self._ready
        except (OSError, TimeoutError) as error:
            self.close()
            raise EngineDeadError(
                f"the replica {self.name} is not reached: {error or 'no answer'}"
            ) from error
        self._pinging = asyncio.ensure_future(self._ping())

    def send(self, kind: Kind, value: Any) -> None:
        """Send a frame; nothing where the connection is over, which `on_lost` has told or will."""
        if self._channel is not None:
            self._channel.send(kind, pack(value))

    async def call(self, method: str, **args: Any) -> Any:
        """Call a method of the replica. Raises what it raises, EngineDeadError where the replica is lost meanwhile."""
        if self._channel is None or not self._channel.is_open:
            raise EngineDeadError(f"the replica {self.name} is gone")
        number = time.monotonic_ns()
        while number in self._calls:
            number += 1
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        self.send(Kind.CALL, (number, method, args))
        try:
            return await answer
        finally:
            self._calls.pop(number, None)

    def close(self) -> None:
        """End the connection; the owner is told as of any other loss."""
        if self._channel is not None:
            self._channel.close()

    async def _ping(self) -> None:
        now = asyncio.get_running_loop().time
        while (channel := self._channel) is not None and channel.is_open:
            if now() - channel.last_heard > self.hang_seconds:
                channel.close()
                return
            channel.send(Kind.PING)
            await asyncio.sleep(PING_SECONDS)

    def _on_frame(self, channel: Channel, kind: Kind, body: bytes) -> None:
        match kind:
            case Kind.OUTCOMES:
                self._owner.on_entries(self, read_entries(body))
            case Kind.STATUS:
                self.status = unpack(body)
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(None)
                self._owner.on_status(self)
            case Kind.REPLY:
                number, answer, error = unpack(body)
                waiting = self._calls.get(number)
                if waiting is not None and not waiting.done():
                    if error is None:
                        waiting.set_result(answer)
                    else:
                        waiting.set_exception(error_from(error))
            case Kind.LEAVING:
                self.is_leaving = True
                self._owner.on_leaving(self)

    def _on_lost(self, channel: Channel) -> None:
        self._channel = None
        if self._pinging is not None:
            self._pinging.cancel()
        gone = EngineDeadError(f"the replica {self.name} is gone")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineDeadError(f"the replica {self.name} has closed the connection"))
        for waiting in list(self._calls.values()):
            if not waiting.done():
                waiting.set_exception(gone)
        self._owner.on_lost(self)
