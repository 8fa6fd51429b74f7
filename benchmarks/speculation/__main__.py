"""Measures drafts: one server with them beside one without, in turns, over HTTP, and whether any answer differs.

    python -m benchmarks.speculation MODEL                      # a real model's folder: all workloads of texts
    python -m benchmarks.speculation MODEL --only copying-0.7   # one of them
    python -m benchmarks.speculation MODEL --of vllm            # a peer's n-grams (or llamacpp)
    python -m benchmarks.speculation --only random              # the benchmarks' own model, whose weights are random

Each prompt of a round has a salt of its own, so that nothing is found that an earlier round left; `epoch2` alone asks
the same prompts again under one salt, with new seeds. A gain is the seconds without drafts over the seconds with them,
of whole requests, prefill included; the median of the rounds counts. How many answers differ between two rounds
without drafts is told too: a peer's may differ from themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer

from benchmarks.model import model_folder
from benchmarks.speculation.servers import CONTENDERS, Answer, Server, running
from benchmarks.speculation.workloads import Workload, workloads

TOKENS = 120


@dataclass
class Round:
    """What one round of one server gave."""

    seconds: float = 0.0
    choices: list[Any] = field(default_factory=list)
    num_tokens: int = 0
    drafted: int | None = None
    accepted: int | None = None


async def run(server: Server, workload: Workload, number: int, *, seeds_of: int | None = None) -> Round:
    """Run a workload once. `seeds_of`: the round whose seeds are asked for again."""
    done = Round()
    limits = asyncio.Semaphore(workload.streams)
    seeded = number if seeds_of is None else seeds_of
    async with httpx.AsyncClient(timeout=300.0) as client:

        async def ask(prompt: str | list[int], salt: str, seed: int) -> Answer:
            body = {
                "prompt": prompt,
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "seed": seed,
                "temperature": workload.temperature,
                "n": workload.n,
            }
            async with limits:
                return await server.ask(client, body, salt)

        for epoch in range(workload.epochs):
            began = time.perf_counter()
            answers = await asyncio.gather(
                *(
                    ask(prompt, f"{number}-{i}", 1000 * seeded + 100 * epoch + i)
                    for i, prompt in enumerate(workload.prompts)
                )
            )
            done.seconds = time.perf_counter() - began
    for answer in answers:
        done.choices += answer.choices
        done.num_tokens += answer.num_tokens
        if answer.drafted is not None and answer.accepted is not None:
            done.drafted = (done.drafted or 0) + answer.drafted
            done.accepted = (done.accepted or 0) + answer.accepted
    return done


def main(
    model: Annotated[Path | None, typer.Argument(help="A model's folder; none: random weights.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(workloads())}.")] = None,
    of: Annotated[str, typer.Option(help=f"Whose drafts: of {', '.join(CONTENDERS)}.")] = "ours",
    repeat: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 3,
    speculation: Annotated[str, typer.Option(help="What of ours is compared with off.")] = "auto",
) -> None:
    """Print the gain of each workload."""
    fitting = [
        name
        for name, workload in workloads().items()
        if (name == "random") == (model is None) and (CONTENDERS[of].takes_ids_and_n or workload.is_plain)
    ]
    with running(of, model or model_folder(), ("off", speculation)) as servers:
        for name in only or fitting:
            print(measured(name, servers, speculation, repeat), flush=True)


def measured(name: str, servers: dict[str, Server], speculation: str, repeat: int) -> str:
    """Return the line of one workload."""
    workload = workloads()[name]
    for server in servers.values():
        asyncio.run(run(server, replace(workload, prompts=workload.prompts[:1]), 0))  # warms up
    rounds = [
        {which: asyncio.run(run(server, workload, number)) for which, server in servers.items()}
        for number in range(1, repeat + 1)
    ]
    again = asyncio.run(run(servers["off"], workload, repeat + 1, seeds_of=1))
    return line(name, rounds, speculation, again)


def line(name: str, rounds: Sequence[dict[str, Round]], speculation: str, again: Round) -> str:
    """Return the figures of a workload's rounds in one line. `again`: the first without drafts, once more."""
    off, on = [r["off"] for r in rounds], [r[speculation] for r in rounds]
    gain = median(a.seconds / b.seconds for a, b in zip(off, on, strict=True))
    differing = sum(_differing(a, b) for a, b in zip(off, on, strict=True))
    answers = sum(len(r.choices) for r in off)
    each = median(1e3 * r.seconds / max(1, r.num_tokens) for r in off)
    drafts = ""
    if all(r.accepted is not None for r in on):
        accepted, drafted = sum(r.accepted or 0 for r in on), sum(r.drafted or 0 for r in on)
        drafts = f" of {sum(r.num_tokens for r in on)} tokens {accepted} accepted, {drafted} drafted;"
    return (
        f"{name:12} gain {gain:.2f}  {each:.1f} ms a token without, {each / gain:.1f} with;{drafts} "
        f"{differing} of {answers} answers differ; without drafts {_differing(off[0], again)} of "
        f"{len(again.choices)} differ from themselves"
    )


def _differing(one: Round, other: Round) -> int:
    return sum(x != y for x, y in zip(one.choices, other.choices, strict=True))


if __name__ == "__main__":
    typer.run(main)
