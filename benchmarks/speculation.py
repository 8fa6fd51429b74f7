"""Measures drafts: one server with them beside one without, in turns, over HTTP, and whether any answer differs.

    python -m benchmarks.speculation MODEL                      # a real model's folder: all workloads of texts
    python -m benchmarks.speculation MODEL --only copying-0.7   # one of them
    python -m benchmarks.speculation --only random              # the benchmarks' own model, whose weights are random

Each prompt of a round has a salt of its own, so that nothing is found that an earlier round left; `epoch2` alone asks
the same prompts again under one salt, with new seeds. A gain is the seconds without drafts over the seconds with them,
of whole requests, prefill included; the median of the rounds counts.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer

from benchmarks.idle import wait_until_idle
from benchmarks.model import model_folder
from benchmarks.speculation_texts import COPYING, FREE

TOKENS = 120
START_TIMEOUT_S = 300.0
RANDOM_IDS = range(1000, 150_000)


@dataclass(frozen=True)
class Workload:
    """Requests that run side by side, several times with other seeds."""

    prompts: Sequence[str | list[int]]
    temperature: float
    streams: int = 1  # requests at once
    n: int = 1
    epochs: int = 1  # the last is measured; the others come before it, under the same salt


def workloads() -> dict[str, Workload]:
    copying, free = list(COPYING.values()), list(FREE.values())
    rng = random.Random(0)
    ids: list[str | list[int]] = [rng.choices(RANDOM_IDS, k=64) for _ in range(3)]
    return {
        "copying-0": Workload(copying, 0.0),
        "copying-0.7": Workload(copying, 0.7),
        "free-0": Workload(free, 0.0),
        "free-0.7": Workload(free, 0.7),
        "8-streams": Workload(copying * 2, 0.0, streams=8),
        "8-siblings": Workload(copying[:2] + free[:2], 0.7, n=8),
        "epoch2": Workload(copying[:2] + free[:2], 1.0, n=4, epochs=2),
        "random": Workload(ids, 1.0),
    }


@dataclass
class Round:
    """What one round of one server gave."""

    seconds: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


class Server:
    """One `myserve serve` in a process of its own."""

    def __init__(self, model: Path, speculation: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "myserve", "serve", str(model), "--port", str(port)]
        command += [
            "--served-model-name",
            "default",
            "--speculation",
            speculation,
            "--kv-cache-bytes",
            "512MiB",
        ]
        self._process = subprocess.Popen([*command, "--max-model-len", "4096"], start_new_session=True)

    def wait_until_ready(self) -> None:
        """Until it answers."""
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise SystemExit("the server did not start")

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()

    def run(self, workload: Workload, number: int) -> Round:
        return asyncio.run(self._run(workload, number))

    async def _run(self, workload: Workload, number: int) -> Round:
        done = Round()
        limits = asyncio.Semaphore(workload.streams)
        async with httpx.AsyncClient(base_url=self.url, timeout=300.0) as client:

            async def ask(prompt: str | list[int], salt: str, seed: int) -> dict[str, Any]:
                body = {
                    "model": "default", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "seed": seed,
                    "temperature": workload.temperature, "n": workload.n, "cache_salt": salt,
                    "return_token_ids": True, "perf_metrics_in_response": True,
                }  # fmt: skip
                async with limits:
                    response = await client.post("/v1/completions", json=body)
                response.raise_for_status()
                answer: dict[str, Any] = response.json()
                return answer

            for epoch in range(workload.epochs):
                began = time.perf_counter()
                answers = await asyncio.gather(
                    *(
                        ask(prompt, f"{number}-{i}", 1000 * number + 100 * epoch + i)
                        for i, prompt in enumerate(workload.prompts)
                    )
                )
                done.seconds = time.perf_counter() - began
        for answer in answers:
            done.tokens += [choice["token_ids"] for choice in answer["choices"]]
            done.drafted += answer["perf_metrics"].get("speculation-generated-tokens", 0)
            done.accepted += answer["perf_metrics"].get("speculation-accepted-tokens", 0)
        return done


@contextmanager
def running(model: Path, speculations: Sequence[str]) -> Iterator[dict[str, Server]]:
    servers = {name: Server(model, name) for name in speculations}
    try:
        for server in servers.values():
            server.wait_until_ready()
        wait_until_idle(patience=40.0)  # both record their steps ahead
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def main(
    model: Annotated[Path | None, typer.Argument(help="A model's folder; none: random weights.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(workloads())}.")] = None,
    repeat: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 3,
    speculation: Annotated[str, typer.Option(help="What is compared with off.")] = "auto",
) -> None:
    """Print the gain of each workload."""
    chosen = only or [name for name in workloads() if (name == "random") == (model is None)]
    with running(model or model_folder(), ("off", speculation)) as servers:
        for name in chosen:
            workload = workloads()[name]
            for server in servers.values():
                server.run(replace(workload, prompts=workload.prompts[:1]), 0)  # warms up
            rounds = [
                {which: server.run(workload, number) for which, server in servers.items()}
                for number in range(1, repeat + 1)
            ]
            print(line(name, rounds, speculation), flush=True)


def line(name: str, rounds: Sequence[dict[str, Round]], speculation: str) -> str:
    """Return the figures of a workload's rounds in one line."""
    off, on = [r["off"] for r in rounds], [r[speculation] for r in rounds]
    gain = median(a.seconds / b.seconds for a, b in zip(off, on, strict=True))
    differing = sum(
        x != y for a, b in zip(off, on, strict=True) for x, y in zip(a.tokens, b.tokens, strict=True)
    )
    answers = sum(len(r.tokens) for r in off)
    tokens, accepted = sum(len(t) for r in on for t in r.tokens), sum(r.accepted for r in on)
    drafted = sum(r.drafted for r in on)
    each = median(1e3 * r.seconds / max(1, sum(map(len, r.tokens))) for r in off)
    return (
        f"{name:12} gain {gain:.2f}  {each:.1f} ms a token without, {each / gain:.1f} with; of {tokens} tokens "
        f"{accepted} accepted, {drafted} drafted; {differing} of {answers} answers differ"
    )


if __name__ == "__main__":
    typer.run(main)
