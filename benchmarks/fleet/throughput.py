"""What a fleet costs beside one server: tokens a second, the time of a first token, CPU of a stream. In turns.

    python -m benchmarks.fleet.throughput                   # the embedded model
    python -m benchmarks.fleet.throughput --model FOLDER    # another

Tokens a second: two replicas with one core each, and a server with two. First token and CPU: one replica that has all
cores, behind its ingress, and a server that has them: the same products, so that the ingress is what differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from contextlib import ExitStack, suppress
from statistics import median

import aiohttp
import psutil

from benchmarks.fleet.serving import Serving, is_well, serving

IDLE_SECONDS = 10.0


class Measured:
    """A server, and what was measured of it, a number a round."""

    def __init__(self, name: str, server: Serving, replicas: int) -> None:
        self.name, self.server, self.replicas = name, server, replicas
        self.tokens_per_s: list[float] = []
        self.cpu_us_per_token: list[float] = []
        # seconds of CPU in a second without a request
        self.idle = 0.0
        self.idle_us_per_token: list[float] = []
        self.first_token_ms: list[float] = []

    def cpu(self) -> float:
        """Seconds of CPU that its processes have had: Ray's own, the grammar's workers and so on included."""
        total = 0.0
        for process in [root := psutil.Process(self.server.process.pid), *root.children(recursive=True)]:
            with suppress(psutil.Error):
                total += sum(process.cpu_times()[:2])
        return total


async def stream(session: aiohttp.ClientSession, url: str, model: str, seed: int, tokens: int) -> float:
    """Return the milliseconds until the first token; the stream is read to its end."""
    prompt = random.Random(seed).choices(range(3, 200), k=64)
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "seed": seed,
        "stream": True,
        "ignore_eos": True,
    }
    began, first = time.perf_counter(), 0.0
    async with session.post(url + "/v1/completions", json=body) as response:
        async for line in response.content:
            if not first and line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
                first = time.perf_counter()
        if response.status != 200 or not first:
            raise SystemExit(f"{url} answered {response.status}")
    return 1000 * (first - began)


async def one_round(measured: Measured, number: int, args: argparse.Namespace) -> None:
    """Ask one by one, then all at once."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await is_well(session, measured.server, measured.replicas)
        async with session.get(measured.server.url + "/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        url = measured.server.url
        for each in range(args.alone):
            measured.first_token_ms.append(await stream(session, url, model, 1000 * number + each, 2))
        began, cpu = time.perf_counter(), measured.cpu()
        seeds = range(10_000 * (number + 1), 10_000 * (number + 1) + args.streams)
        await asyncio.gather(*(stream(session, url, model, seed, args.tokens) for seed in seeds))
        total, took = args.streams * args.tokens, time.perf_counter() - began
        measured.tokens_per_s.append(total / took)
        measured.idle_us_per_token.append(1e6 * measured.idle * took / total)
        measured.cpu_us_per_token.append(1e6 * (measured.cpu() - cpu) / total)


async def rest(measured: Measured) -> None:
    """Measure what it takes with nothing to do."""
    async with aiohttp.ClientSession() as session:
        await is_well(session, measured.server, measured.replicas)
    # until the shapes that an idle engine records ahead are recorded
    await asyncio.sleep(10.0)
    cpu = measured.cpu()
    await asyncio.sleep(IDLE_SECONDS)
    measured.idle = (measured.cpu() - cpu) / IDLE_SECONDS


def main() -> None:
    """Read the command line, measure in turns, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="a folder; default: the embedded model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--alone", type=int, default=20, help="requests one by one, for the first token")
    parser.add_argument("--rounds", type=int, default=5, help="the first warms up and is not counted")
    args = parser.parse_args()
    model = [args.model] if args.model else []
    cores = str(psutil.cpu_count())
    with ExitStack() as stack:
        kinds = [
            ("one server", 0, []),
            ("one replica", 1, ["--replicas", "1", "--replica-cpus", cores]),
            ("two replicas", 2, ["--replicas", "2", "--replica-cpus", "1"]),
        ]
        servers = []
        for name, replicas, options in kinds:
            servers.append(Measured(name, stack.enter_context(serving(*model, *options)), replicas))
            # started one after the other
            assert servers[-1].server.url
        for measured in servers:
            asyncio.run(rest(measured))
        for number in range(args.rounds):
            for measured in servers:
                asyncio.run(one_round(measured, number, args))
    skipped = args.alone
    print(f"{'':14} {'tokens/s':>10} {'CPU us/token':>13} {'of it idle':>11} {'first token ms':>15}")
    for each in servers:
        figures = (
            median(each.tokens_per_s[1:]),
            median(each.cpu_us_per_token[1:]),
            median(each.idle_us_per_token[1:]),
            median(each.first_token_ms[skipped:]),
        )
        print(f"{each.name:14} {figures[0]:10.0f} {figures[1]:13.0f} {figures[2]:11.0f} {figures[3]:15.2f}")


if __name__ == "__main__":
    main()
