"""Waterfalls of a large vocabulary beside running streams: the streams' bits stay, and how long they wait is told.

    python -m benchmarks.verify.waterfalls                      # 8 streams, three rounds with and three without
    python -m benchmarks.verify.waterfalls --streams 8 --rounds 3 --tokens 150

A server of its own process on a tiny random model with 151,936 ids. The streams are drawn in rounds: without
waterfalls, and beside a client that asks for one after the other, of tokens that the first round drew. Each must be the
recorded token with its logprob, and every stream must have the tokens and logprobs of the first round. Ends with
status 1 where one has not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.model import VOCAB_SIZE, write_tokenizer

__all__ = ["Drawn", "beside_waterfalls", "make_model", "streams", "wrong_waterfall"]

START_TIMEOUT_S, AT_ONCE_S = 300.0, 5e-4
Json = dict[str, Any]
FILTERS: Sequence[Mapping[str, Any]] = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0.9, "top_k": 400, "min_p": 0.001},
    {"temperature": 1.1, "top_p": 0.9, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
)


@dataclass
class Drawn:
    """Hold one stream: its tokens and logprobs in order, and when its events came."""

    request: Json
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)  # by the clock, and of the server's CPU

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Return the seconds between two events, by the clock and of the server's CPU; what came at once is one."""
        gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.times, self.times[1:], strict=False)]
        return [gap for gap in gaps if gap[0] > AT_ONCE_S]


def make_model(folder: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """Write a Qwen 3 of two layers and 64 columns, random, with that many ids; return the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    torch.manual_seed(0)
    # not flat: a filter keeps some and removes some
    config = AutoConfig.for_model("qwen3", vocab_size=vocab_size, initializer_range=0.2, **shape, **ids)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, vocab_size)
    return folder


async def streams(client: httpx.AsyncClient, requests: Sequence[Json], pid: int) -> list[Drawn]:
    """Draw all at once, streamed, from the server of this process id."""
    return await asyncio.gather(*(_stream(client, request, pid) for request in requests))


async def _stream(client: httpx.AsyncClient, request: Json, pid: int) -> Drawn:
    drawn = Drawn(request)
    body = request | {"stream": True, "logprobs": True, "return_token_ids": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            drawn.times.append((time.perf_counter(), cpu_seconds(pid)))
            for choice in json.loads(line[6:]).get("choices") or ():
                drawn.ids += choice.get("token_ids") or []
                drawn.logprobs += [e["logprob"] for e in (choice.get("logprobs") or {}).get("content") or ()]
    return drawn


async def beside_waterfalls(
    client: httpx.AsyncClient, requests: Sequence[Json], recorded: Sequence[Drawn], pid: int
) -> tuple[list[Drawn], list[float], list[str]]:
    """Draw the streams while waterfalls are asked for, one by one; return also how long each took, and faults."""
    choose, took, wrong = random.Random(0), list[float](), list[str]()
    running = asyncio.create_task(streams(client, requests, pid))
    while not running.done():
        of = choose.choice(recorded)
        place = choose.randrange(len(of.ids))
        began = time.perf_counter()
        answer = await client.post(
            "/v1/waterfall",
            json={"completion": of.request, "completion_token_ids": of.ids[: place + 1], "position": place},
        )
        took.append(time.perf_counter() - began)
        wrong += wrong_waterfall(answer.status_code, answer.json(), of, place)
    return await running, took, wrong


def wrong_waterfall(status: int, answer: Json, of: Drawn, place: int) -> list[str]:
    """Return what of a waterfall is not as the token was drawn, in words."""
    told = (status, answer.get("is_same"), answer.get("token_id"), answer.get("logprob"))
    due = (200, True, of.ids[place], of.logprobs[place])
    return [] if told == due else [f"token {place} of seed {of.request['seed']}: {told}, and {due} was due"]


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """Run `myserve serve` on a folder until the block ends; give its address and the process's id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "myserve", "serve", str(folder), "--served-model-name", "wide"]
    process = subprocess.Popen([*command, "--port", str(port)])
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


def cpu_seconds(pid: int) -> float:
    """Return what a process has used of all cores: no other process on the machine counts in it."""
    # clock_getcpuclockid(3), which Python does not have: Linux's clock of a process
    return time.clock_gettime((~pid << 3) | 2)


def _words(rounds: Sequence[Sequence[Drawn]]) -> str:
    shown = []
    for which, kind in enumerate(("by the clock", "of the server's CPU")):
        gaps = sorted(gap[which] for drawn in rounds for one in drawn for gap in one.gaps)
        longest = [max(gap[which] for one in drawn for gap in one.gaps) for drawn in rounds]
        each = ", ".join(f"{gap * 1e3:.0f}" for gap in longest)
        p99 = gaps[int(len(gaps) * 0.99)]
        shown.append(
            f"{median(gaps) * 1e3:.1f} ms {kind} (p99 {p99 * 1e3:.0f}, longest of each round {each})"
        )
    return f"between two events {', '.join(shown)}"


async def _run(url: str, pid: int, num_streams: int, num_rounds: int, num_tokens: int) -> list[str]:
    shared = {"model": "wide", "max_tokens": num_tokens, "ignore_eos": True}
    requests = [
        shared | {"prompt": f"Stream {i}: ", "seed": 100 + i} | dict(FILTERS[i % len(FILTERS)])
        for i in range(num_streams)
    ]
    wrong, took = list[str](), list[float]()
    alone, beside = list[list[Drawn]](), list[list[Drawn]]()
    cpu = {"alone": 0.0, "beside": 0.0}
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        recorded = await streams(client, requests, pid)
        await beside_waterfalls(client, requests, recorded, pid)  # steps are recorded, loops compiled
        for _ in range(num_rounds):
            began = cpu_seconds(pid)
            alone.append(await streams(client, requests, pid))
            middle = cpu_seconds(pid)
            drawn, seconds, faults = await beside_waterfalls(client, requests, recorded, pid)
            cpu["alone"] += middle - began
            cpu["beside"] += cpu_seconds(pid) - middle
            beside.append(drawn)
            took += seconds
            wrong += faults
    for again in [*alone, *beside]:
        wrong += [
            f"the stream of seed {one.request['seed']} has other bits"
            for one, other in zip(recorded, again, strict=True)
            if (one.ids, one.logprobs) != (other.ids, other.logprobs)
        ]
    print(f"{num_streams} streams of {num_tokens} tokens, {VOCAB_SIZE:,} ids")
    print(f"without waterfalls: {_words(alone)}")
    print(f"beside {len(took)} waterfalls: {_words(beside)}")
    each = (cpu["beside"] - cpu["alone"]) / len(took)
    print(
        f"a waterfall: {median(took) * 1e3:.0f} ms (longest {max(took) * 1e3:.0f}); the server's CPU: "
        f"{each * 1e3:.0f} ms for each, {cpu['alone']:.2f} s for all rounds' streams alone"
    )
    print(f"{len(wrong)} wrong", *wrong[:10], sep="\n")
    return wrong


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=150)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(make_model(Path(folder))) as (url, pid):
        wrong = asyncio.run(_run(url, pid, asked.streams, asked.rounds, asked.tokens))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
