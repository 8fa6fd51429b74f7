"""Our router beside Ray's: prompt tokens that caches held, and the time of a first token, on live replicas.

    python -m benchmarks.fleet.routers --model FOLDER

Each router has a fleet of its own: two replicas, a process and a core each, started anew, so that every cache begins
empty. The traffic is the same: conversations whose turns wait for their answers, and groups of eight requests of one
prompt, sent one by one as a client of n = 1 sends them.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

from benchmarks.fleet.policies import POLICIES
from myserve.cluster.fleet_engine import FleetEngine
from myserve.cluster.messages import Member, Members
from myserve.cluster.policy import Router
from myserve.cluster.replica import ReplicaServer
from myserve.core.params import SamplingParams
from myserve.embedded import embedded_model_path
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.weights.loader import load_tokenizer

SECRET = "of this benchmark"


@dataclasses.dataclass
class Figures:
    """What one kind of traffic had."""

    first_token_ms: list[float] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0

    def row(self) -> str:
        """Its cells."""
        late = quantiles(self.first_token_ms, n=10)[8]
        return (
            f"{self.cached_tokens / self.prompt_tokens:.1%} | {median(self.first_token_ms):.0f} | {late:.0f} | "
            f"{self.seconds:.1f}"
        )


class Listed:
    """The list of replicas, which does not change."""

    def __init__(self, members: tuple[Member, ...]) -> None:
        self._members = Members("1", members, 0)

    async def members(self, known: str) -> Members:
        if known == self._members.generation:
            await asyncio.Event().wait()
        return self._members


def be_a_replica(model: str, name: str) -> None:
    """Serve as one until our input ends; the first line says where."""
    engine = Engine.from_pretrained(model, EngineConfig(threads=1))
    server = ReplicaServer(engine, SECRET)
    server.start()
    where = [name, server.host, server.port, server.bits, engine.weight_version, server.num_adapter_changes]
    print(json.dumps(where), flush=True)
    sys.stdin.read()
    server.close()


@contextmanager
def fleet(model: str, router: Any, replicas: int) -> Iterator[FleetEngine]:
    """Start replicas and the ingress's engine, which routes by `router`."""
    command = [sys.executable, "-m", "benchmarks.fleet.routers", "--model", model, "--replica"]
    processes = [
        subprocess.Popen([*command, f"r{at}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for at in range(replicas)
    ]
    try:
        members = tuple(Member(*json.loads(_line_of(process))) for process in processes)
        engine = FleetEngine(
            Listed(members), SECRET, EngineConfig(), load_tokenizer(model, trust_remote_code=False)
        )  # type: ignore[arg-type]
        engine.fleet._router = router
        engine.start()
        while len(engine.links) < replicas:
            time.sleep(0.05)
        yield engine
        engine.shutdown()
    finally:
        for process in processes:
            process.communicate()


def _line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


async def ask(engine: FleetEngine, ids: list[int], tokens: int, seed: int, figures: Figures) -> list[int]:
    """Return the ids of an answer of so many tokens; count what it had."""
    params = SamplingParams(seed=seed, max_tokens=tokens, ignore_eos=True)
    began, first = time.perf_counter(), 0.0
    drawn: list[int] = []
    stream = engine.submit(ids, params, SubmitOptions())
    async for delta in stream:
        first = first or time.perf_counter()
        drawn += [token.token_id for token in delta.tokens]
        if delta.metrics is not None:
            figures.cached_tokens += delta.metrics.cached_tokens
    figures.first_token_ms.append(1000 * (first - began))
    figures.prompt_tokens += len(ids)
    return drawn


async def conversations(engine: FleetEngine, args: argparse.Namespace, figures: Figures) -> None:
    """Hold conversations side by side, each turn behind its answer, all with one system prompt."""
    system = _ids(random.Random(0), args.system)

    async def hold(number: int) -> None:
        rng = random.Random(number)
        ids = list(system)
        for turn in range(args.turns):
            ids += _ids(rng, args.turn)
            ids += await ask(engine, ids, args.answer, 100 * number + turn, figures)

    await asyncio.gather(*(hold(number) for number in range(1, 1 + args.conversations)))


async def groups(engine: FleetEngine, args: argparse.Namespace, figures: Figures) -> None:
    """Send eight requests of each prompt, one by one; so many prompts at once."""
    at_once = asyncio.Semaphore(args.conversations)

    async def group(number: int) -> None:
        ids = _ids(random.Random(-number), args.system + args.turn)
        async with at_once:
            await asyncio.gather(*(ask(engine, ids, args.answer, seed, figures) for seed in range(8)))

    await asyncio.gather(*(group(number) for number in range(1, 1 + 3 * args.conversations)))


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 2000) for _ in range(count)]


async def _measured(traffic: Any, engine: FleetEngine, args: argparse.Namespace) -> Figures:
    figures, began = Figures(), time.perf_counter()
    await traffic(engine, args, figures)
    figures.seconds = time.perf_counter() - began
    return figures


def main() -> None:
    """Read the command line, measure router after router, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(embedded_model_path()), help="a folder; default: the embedded one"
    )
    parser.add_argument("--replica", help="be the replica of this name: for this program's own use")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--system", type=int, default=256, help="tokens of the system prompt")
    parser.add_argument("--turn", type=int, default=128, help="tokens that each turn brings")
    parser.add_argument("--answer", type=int, default=24, help="tokens of an answer")
    args = parser.parse_args()
    if args.replica:
        be_a_replica(args.model, args.replica)
        return
    print("traffic | router | prompt tokens cached | first token, median ms | 9 of 10 within ms | seconds")
    for traffic in (conversations, groups):
        for name, make in {"ours": Router, **POLICIES}.items():
            with fleet(args.model, make(), args.replicas) as engine:
                # one before, so that the ingress has imported what it needs
                asyncio.run(ask(engine, _ids(random.Random(name), 40), 4, 0, Figures()))
                print(traffic.__name__, name, asyncio.run(_measured(traffic, engine, args)).row(), sep=" | ")


if __name__ == "__main__":
    main()
