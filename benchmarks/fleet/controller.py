"""What a large fleet costs its controller and an ingress: a change of weights, and an idle second. Replicas are light.

    python -m benchmarks.fleet.controller --replicas 8 64 512    # the table of docs/scale.md

A light replica speaks the fleet's protocol over a socket of its own and has no engine: it has prepared and swapped at
once. So what is measured is what the fleet adds; reading and packing a model's files comes to it on every node. The
replicas are another process; Ray's own calls, by which heartbeats come to a controller, are not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict
from statistics import median
from typing import Any

from myserve.cluster.channel import Channel, Kind, pack, unpack
from myserve.cluster.controller import Controller
from myserve.cluster.fleet import Fleet
from myserve.cluster.messages import Member, Members, ReplicaFacts, ReplicaStatus
from myserve.engine.weights.prepare import WeightReport

SECRET = "of this benchmark"
ROUNDS = 5  # changes of weights
IDLE_SECONDS = 10.0


class LightReplica:
    """Answers as a replica would whose engine takes no time."""

    def __init__(self) -> None:
        self.weight_version = 0
        self._next = 0

    def channel(self) -> Channel:
        """Return the end of a new connection."""
        return Channel(self._on_frame, lambda channel: None, expects=SECRET)

    def _on_frame(self, channel: Channel, kind: Kind, body: bytes) -> None:
        if kind in (Kind.HELLO, Kind.PING):
            facts = ReplicaFacts(32_000, 4096, (2,), None, {"rows_are_independent": True}, {}, "0")
            channel.send(Kind.STATUS, pack(ReplicaStatus(facts, self.weight_version, True, False)))
        elif kind is Kind.CALL:
            number, name, args = unpack(body)
            channel.send(Kind.REPLY, pack((number, self._answer(name, args), None)))

    def _answer(self, name: str, args: dict[str, Any]) -> object:
        if name == "prepare_weights":
            self._next = args["change"].weight_version
            return None
        assert name == "swap_weights", name
        self.weight_version = self._next
        return asdict(WeightReport(self._next, "sum", 1, 1, 0.0, 0.0, 0.0, 0))


async def be_replicas(count: int) -> None:
    """Listen as so many, say where, and serve until cancelled."""
    loop = asyncio.get_running_loop()
    listeners = [await loop.create_server(LightReplica().channel, "127.0.0.1", 0) for _ in range(count)]
    print(json.dumps([listener.sockets[0].getsockname()[1] for listener in listeners]), flush=True)
    await asyncio.Event().wait()


class Directory:
    """The controller's list, as an ingress follows it."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def members(self, known: str) -> Members:
        return await self._controller.members(known)


async def measure(ports: list[int]) -> tuple[float, float, float]:
    """Return milliseconds of a change of weights, and the share of a core of an idle ingress and of heartbeats."""
    controller = Controller(SECRET)
    members = [Member(f"r{at}", "127.0.0.1", port, "0", 0, 0) for at, port in enumerate(ports)]
    for member in members:
        await controller.heartbeat(member)
    took = []
    for version in range(1, ROUNDS + 1):
        began = time.perf_counter()
        await controller.update_weights("change", folder="none", version=version)
        # the first waits until a new controller has heard of all
        took.append(time.perf_counter() - began)
    heartbeats = await _share_of_a_core(_beat(controller, list(controller._members.values())), 1.0)
    fleet = Fleet(Directory(controller), SECRET)
    running = asyncio.ensure_future(fleet.run())
    while len(fleet._usable()) < len(members):
        await asyncio.sleep(0.05)
    ingress = await _share_of_a_core(asyncio.sleep(IDLE_SECONDS), IDLE_SECONDS)
    running.cancel()
    await fleet.end()
    return 1000 * median(took[1:]), ingress, heartbeats


async def _beat(controller: Controller, members: list[Member]) -> None:
    """A second's heartbeats, for each replica calls once a second."""
    for member in members:
        await controller.heartbeat(member)


async def _share_of_a_core(work: Any, seconds: float) -> float:
    began = time.process_time()
    await work
    return (time.process_time() - began) / seconds


def main() -> None:
    """Read the command line, measure size after size, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="*", default=[8, 64, 512])
    parser.add_argument("--light", type=int, help="be so many replicas: for this program's own use")
    args = parser.parse_args()
    if args.light:
        asyncio.run(be_replicas(args.light))
        return
    print("replicas | change of weights, ms | idle ingress, % of a core | heartbeats, % of a core")
    for count in args.replicas:
        command = [sys.executable, "-m", "benchmarks.fleet.controller", "--light", str(count)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as light:
            assert light.stdout is not None
            change, ingress, heartbeats = asyncio.run(measure(json.loads(light.stdout.readline())))
            light.kill()
        print(f"{count} | {change:.0f} | {100 * ingress:.1f} | {100 * heartbeats:.2f}", flush=True)


if __name__ == "__main__":
    main()
