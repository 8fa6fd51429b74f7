"""A fleet without Ray: replicas, controller and ingress in one process, over real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.stores import ControllerDiedError, Store
from myserve.cluster.controller import Controller, ControllerLostError
from myserve.cluster.fleet_engine import FleetEngine
from myserve.cluster.link import Link
from myserve.cluster.messages import Entry, Member
from myserve.cluster.replica import ReplicaServer
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine

SECRET = "of this fleet"


class SmallFleet:
    """Replicas by name; `engine` is the fleet as routes see it."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self._folder, self._config = folder, config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.store = Store()
        self.controller = self.run(self._controller())
        self.replicas: dict[str, ReplicaServer] = {}
        self.add("one")
        self.add("two")
        tokenizer = self.replicas["one"].engine.tokenizer
        self.engine: Any = FleetEngine(self, SECRET, config, tokenizer)  # type: ignore[arg-type]  # see __getattr__
        self.engine.start()
        self._beating = asyncio.run_coroutine_threadsafe(self._beat(), self._loop)
        self.wait_for(2)

    async def _beat(self) -> None:
        """Each replica calls now and then, as its deployment does."""
        while True:
            for name, server in list(self.replicas.items()):
                told = self.member(name)
                standing = await self.controller.heartbeat(told)
                if standing.missing and self.member(name) == told:
                    await asyncio.wrap_future(server.run(server.apply(standing.missing)))
            await asyncio.sleep(0.3)

    async def _controller(self) -> Controller:
        return Controller(SECRET, self.store)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The controller's methods, on its own loop: what a handle of Ray does."""

        async def call(*args: Any, **options: Any) -> Any:
            method = getattr(self.controller, name)
            coming = asyncio.run_coroutine_threadsafe(method(*args, **options), self._loop)
            try:
                return await asyncio.wrap_future(coming)
            except ControllerDiedError as died:
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._replace(), self._loop))
                raise ControllerLostError("the fleet's controller was lost") from died

        return call

    async def _replace(self) -> None:
        """Start another controller, by what the one that died has written."""
        self.store.fault = lambda body, when: None
        dead, self.controller = self.controller, await self._controller()
        dead._note_change()  # who waits there asks anew

    def add(self, name: str) -> ReplicaServer:
        """Start a replica, and let it take what the fleet has published."""
        server = ReplicaServer(Engine.from_pretrained(str(self._folder), self._config), SECRET)
        server.start()
        self.replicas[name] = server
        while missing := self.heartbeat(name).missing:
            server.run(server.apply(missing)).result(60)
        return server

    def member(self, name: str) -> Member:
        server = self.replicas[name]
        version = server.engine.weight_version
        return Member(name, server.host, server.port, server.bits, version, server.num_adapter_changes)

    def heartbeat(self, name: str) -> Any:
        return self.run(self.controller.heartbeat(self.member(name)))

    def wait_for(self, count: int) -> None:
        while len(self.engine.links) != count:
            threading.Event().wait(0.02)

    def lose_after(self, monkeypatch: pytest.MonkeyPatch, entries: int) -> list[str]:
        """Cut a replica's connection once so many entries have come from it; return the list that names it then."""
        fleet, lost, seen = self.engine.fleet, [], 0
        take = fleet.on_entries

        def cut(link: Link, brought: list[Entry]) -> None:
            nonlocal seen
            for at in range(len(brought)):
                seen += 1
                take(link, brought[at : at + 1])
                # on a busy machine the first may have ended before others came
                if seen >= entries and not lost and any(at is link for _, at in fleet._parts.values()):
                    lost.append(link.name)
                    link.close()
                    return

        monkeypatch.setattr(fleet, "on_entries", cut)
        return lost

    def close(self) -> None:
        self.engine.shutdown()
        for server in self.replicas.values():
            server.close()
        self._beating.cancel()
        self.run(asyncio.sleep(0.01))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def small_fleet(tiny_model: Callable[[str], Path]) -> Iterator[SmallFleet]:
    fleet = SmallFleet(tiny_model("llama"), EngineConfig(num_blocks=128, threads=1))
    yield fleet
    fleet.close()
