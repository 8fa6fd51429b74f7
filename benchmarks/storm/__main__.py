"""256 streams, clients that leave, nonsense, new weights every 20 s: no wrong answer, no 500, no leak, a quick /health.

    python -m benchmarks.storm                      # five minutes
    python -m benchmarks.storm --seconds 30

A server of its own process on the embedded model. One request in five is left at a random moment, one in twenty is
malformed; every answer that came whole is judged by `judge`, against what a fresh server gives when it is asked
for that alone. /health is asked every 50 ms by a third process, so that our own load does not slow the clock. Ends with
status 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.hot_load.server import MODES, SNAPSHOTS, make_snapshots, served
from benchmarks.storm.judge import Told, control, judge, read_stream, read_whole, replayed
from benchmarks.storm.requests import KINDS, Kind, kinds, malformed

LEAVE, MALFORMED = 0.20, 0.05
HEALTH_P99 = 0.1  # seconds
GROWTH = 1.10  # of the resident memory, from a third of the time on

PROBE = """
import http.client, sys, time
host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + seconds
while time.monotonic() < end:
    began, connection = time.monotonic(), http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", "/health"); answer = connection.getresponse(); answer.read()
    connection.close()
    print(answer.status, time.monotonic() - began, flush=True)
    time.sleep(0.05)
"""


@dataclass
class Storm:
    """Collect the answers, failures and reports of a run."""

    told: list[tuple[Kind, list[Told]]] = field(default_factory=list)
    left: int = 0
    refused: Counter[int] = field(default_factory=Counter)  # malformed requests, by status
    failures: list[str] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    snapshot_of: dict[int, int] = field(default_factory=lambda: {0: 0})  # by version
    health: list[float] = field(default_factory=list)  # seconds
    samples: list[dict[str, float]] = field(default_factory=list)  # of /metrics, once every two seconds
    idle: dict[str, float] = field(default_factory=dict)  # of /metrics, before and after


async def storm(url: str, seconds: float, streams: int, every: float, seed: int) -> Storm:
    run, asked = Storm(), kinds(random.Random(seed))
    async with _session(url) as http:
        await _ready(http)
        before = await _metrics(http)
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(_client(http, run, asked, end, random.Random(f"{seed}/{number}")))
            group.create_task(_update(http, run, end, every))
            group.create_task(_watch(http, run, end))
            group.create_task(_probe(url, run, seconds))
        await asyncio.sleep(2)
        run.idle = {f"before {name}": value for name, value in before.items()} | await _metrics(http)
    return run


def _session(url: str) -> aiohttp.ClientSession:
    """Return a session with a connection for each request: an idle one may be closed just when it is used again."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(1800))


async def _client(
    http: aiohttp.ClientSession, run: Storm, asked: list[Kind], end: float, rng: random.Random
) -> None:
    while time.monotonic() < end:
        lot = rng.random()
        kind = rng.choice(asked)
        try:
            if lot < MALFORMED:
                await _refused(http, run, rng)
            elif lot < MALFORMED + LEAVE:
                await _leave(http, kind, rng)
                run.left += 1
            else:
                run.told.append((kind, await _complete(http, kind, stream=rng.random() < 0.5)))
        except Exception as error:
            run.failures.append(f"{type(error).__name__}: {error}")


async def _complete(http: aiohttp.ClientSession, kind: Kind, *, stream: bool) -> list[Told]:
    async with http.post(kind.path, json=kind.body | {"stream": stream}) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} for a whole request: {(await answer.text())[:300]}")
        return await read_stream(answer.content) if stream else read_whole(await answer.json())


async def _leave(http: aiohttp.ClientSession, kind: Kind, rng: random.Random) -> None:
    """Ask, and be gone a moment later: before the head, between two chunks, inside one."""
    try:
        async with asyncio.timeout(rng.random() ** 2):
            async with http.post(kind.path, json=kind.body | {"stream": rng.random() < 0.5}) as answer:
                while await answer.content.read(rng.randint(1, 400)):
                    pass
                answer.close()
    except TimeoutError:
        pass


async def _refused(http: aiohttp.ClientSession, run: Storm, rng: random.Random) -> None:
    path, body = malformed(rng)
    async with http.post(path, data=body) as answer:
        run.refused[answer.status] += 1
        text = await answer.text()
        if not 400 <= answer.status < 500 or '"error"' not in text:
            raise RuntimeError(f"{answer.status} for {body[:200]!r}: {text[:200]}")


async def _update(http: aiohttp.ClientSession, run: Storm, end: float, every: float) -> None:
    for number, mode in zip(itertools.count(1), itertools.cycle(MODES), strict=False):
        await asyncio.sleep(every)
        if time.monotonic() > end:
            return
        run.snapshot_of[await load_snapshot(http, number % SNAPSHOTS, mode)] = number % SNAPSHOTS
        run.modes[mode] += 1


async def load_snapshot(http: aiohttp.ClientSession, snapshot: int, mode: str) -> int:
    """Load a snapshot; return its weight version."""
    async with http.post("/v1/weights", json={"path": str(snapshot), "mode": mode}) as answer:
        answer.raise_for_status()
        version: int = (await answer.json())["weight_version"]
        return version


async def _watch(http: aiohttp.ClientSession, run: Storm, end: float) -> None:
    while time.monotonic() < end:
        run.samples.append(await _metrics(http))
        await asyncio.sleep(2)


async def _metrics(http: aiohttp.ClientSession) -> dict[str, float]:
    """Sums over the labels, and what was answered with 5xx."""
    found: Counter[str] = Counter()
    async with http.get("/metrics") as answer:
        for line in (await answer.text()).splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] += float(value)
                if name.startswith("http_requests_total") and 'status="5' in name:
                    found["5xx"] += float(value)
    return dict(found)


async def _probe(url: str, run: Storm, seconds: float) -> None:
    host, port = url.removeprefix("http://").split(":")
    command = [sys.executable, "-c", PROBE, host, port, str(seconds)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    async for line in process.stdout:
        status, took = line.split()
        run.health.append(float(took))
        if status != b"200":
            run.failures.append(f"/health {status!r}")
    await process.wait()


async def _ready(http: aiohttp.ClientSession) -> None:
    for _ in range(600):
        try:
            async with http.get("/ready") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass
        await asyncio.sleep(0.1)
    raise RuntimeError("the server did not become ready in a minute")


async def alone(url: str, seed: int) -> list[dict[str, list[Told]]]:
    """Return each kind's answer by each snapshot when nothing else runs."""
    asked, answers = kinds(random.Random(seed)), []
    async with _session(url) as http:
        await _ready(http)
        for snapshot in range(SNAPSHOTS):
            await load_snapshot(http, snapshot, "drain")
            answers.append({kind.name: await _complete(http, kind, stream=False) for kind in asked})
    return answers


def leaks(run: Storm) -> list[str]:
    """Return what was not given back."""
    idle = run.idle
    found = [
        f"{name} is {idle[name]:g} when it is idle"
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        if idle[name]
    ]
    files = idle["process_open_fds"] - idle["before process_open_fds"]
    if files > 8:  # the grammar worker's pipes
        found.append(f"{files:g} files more than before")
    memory = [sample["process_resident_memory_bytes"] for sample in run.samples]
    if len(memory) > 9 and memory[-1] > GROWTH * max(memory[len(memory) // 3 - 1 : len(memory) // 3 + 2]):
        found.append(
            f"memory grew by {memory[-1] / memory[len(memory) // 3] - 1:.0%} after a third of the time"
        )
    return found


def report(run: Storm, answers: list[dict[str, list[Told]]], root: Path, seconds: float) -> bool:
    verdict = judge(run.told, answers, run.snapshot_of)
    recomputed, differing = replayed(verdict.spanning, root, run.snapshot_of)
    health = sorted(run.health)
    p50, p99 = health[len(health) // 2], health[int(len(health) * 0.99)]
    memory = [sample["process_resident_memory_bytes"] / 2**30 for sample in run.samples]
    lost = leaks(run)
    failed = run.idle.get("5xx", 0) - run.idle.get("before 5xx", 0)  # before: /ready, while it loads
    equal, wrong, spanning = verdict.equal, len(verdict.wrong), len(verdict.spanning)
    chance = control(run.told, answers, run.snapshot_of)
    print(f"{seconds:.0f} s: {len(run.told)} whole answers, {verdict.tokens} tokens; {run.left} left midway")
    print(f"malformed, by status: {dict(run.refused)}; answered with 5xx: {failed:g}")
    print(f"hot loads: {dict(run.modes)}; preemptions: {run.idle['vllm:num_preemptions_total']:g}")
    print(
        f"choices equal to their own alone: {equal}; cut by new weights and equal: {verdict.cut}; wrong: {wrong}"
    )
    print(f"of several versions: {spanning}, of them computed again: {recomputed}, differing: {differing}")
    print(f"control, choices that equal another snapshot's: {chance:.1%}")
    print(
        f"/health, ms, of {len(health)}: p50 {1000 * p50:.1f}, p99 {1000 * p99:.1f}, worst {1000 * health[-1]:.1f}"
    )
    print(
        f"resident, GiB: {' '.join(f'{gib:.2f}' for gib in memory[:: max(1, len(memory) // 10)])}; {lost or 'no leak'}"
    )
    for failure in [*verdict.wrong[:3], *run.failures[:3]]:
        print("failure:", failure)
    clean = not (wrong or run.failures or lost or differing or failed)
    return clean and p99 < HEALTH_P99 and bool(run.told)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two hot loads")
    parser.add_argument("--seed", type=int, default=0, help=f"of the {KINDS} requests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_snapshots(root)
        with served(root) as url:
            run = asyncio.run(storm(url, options.seconds, options.streams, options.every, options.seed))
        with served(root) as url:  # another process: what it says is what a restart says
            answers = asyncio.run(alone(url, options.seed))
        if not report(run, answers, root, options.seconds):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
