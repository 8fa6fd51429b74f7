"""Tokens a second per core of client CPU: the SDK, openai-python and the reference client, on one server.

`python -m benchmarks.client [--streams 256] [--tokens 256] [--rounds 3] [--reference PYTHON]`

`--reference` names an interpreter that has `fireworks-ai` with what its training SDK imports (`urllib3`, `requests`).

The server is a process of its own and writes prepared events, one a token, as fast as the socket takes them; so
what is measured is the client: `time.process_time` over the tokens that it handed to its caller. Each round runs
every client once, in turn, and the table gives medians, without the first round's: only ratios of one run mean
anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from myserve.sdk import DeploymentSampler, FixedConcurrencyController

PROMPT = list(range(1, 129))


def event(position: int, *, logprobs: bool) -> bytes:
    """Return a completions server's event for one token; about 110 bytes, or 330 with logprobs."""
    choice: dict[str, Any] = {"index": 0, "text": " tok", "finish_reason": None, "logprobs": None}
    choice["token_ids"] = [position % 1000]
    if logprobs:
        top = {"token": " tok", "logprob": -0.25, "token_id": position % 1000, "bytes": [32, 116, 111, 107]}
        choice["logprobs"] = {"content": [{**top, "sampling_logprob": -0.25, "top_logprobs": [top]}]}
    chunk = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "replay",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def replayed(tokens: int, *, logprobs: bool) -> bytes:
    """Return a whole answer, head included."""
    ids = [position % 1000 for position in range(tokens)]
    last = {"index": 0, "text": "", "finish_reason": "length", "raw_output": {"completion_token_ids": ids}}
    body = b"".join(event(position, logprobs=logprobs) for position in range(tokens))
    body += b"data: " + json.dumps({"choices": [last]}).encode() + b"\n\ndata: [DONE]\n\n"
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Replay(asyncio.Protocol):
    """As little of HTTP as the clients need; the answer is chosen by a word in the request."""

    def __init__(self, tokens: int) -> None:
        self.answers = {flag: replayed(tokens, logprobs=flag) for flag in (False, True)}
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, blank, body = self.received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = next(
            (int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0
        )
        if len(body) < length:
            return
        self.received = b""
        if head.startswith(b"GET"):
            self.transport.write(b'HTTP/1.1 200 OK\r\ncontent-length: 21\r\n\r\n{"version": "replay"}')
        else:
            self.transport.write(self.answers[b'"logprobs"' in body])


def serve(tokens: int, port: Any) -> None:
    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(
            lambda: Replay(tokens), "127.0.0.1", 0, backlog=1024
        )
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def ours(url: str, streams: int, tokens: int, *, logprobs: bool) -> int:
    controller = FixedConcurrencyController(streams)
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if logprobs else {}
    async with DeploymentSampler(
        url, "replay", concurrency_controller=controller, dialect="fireworks"
    ) as sampler:
        calls = [
            sampler.sample_with_prompt_tokens(PROMPT, max_tokens=tokens, seed=i, **options)
            for i in range(streams)
        ]
        groups = await asyncio.gather(*calls)
    return sum(c.completion_len for group in groups for c in group)


async def openais(url: str, streams: int, tokens: int, *, logprobs: bool) -> int:
    import openai

    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"logprobs": 1} if logprobs else {}

    async def one() -> int:
        stream = await client.completions.create(
            model="replay", prompt=PROMPT, max_tokens=tokens, stream=True, **options
        )
        return sum([1 async for chunk in stream if chunk.choices[0].text])

    counts = await asyncio.gather(*(one() for _ in range(streams)))
    await client.close()
    return sum(counts)


CLIENTS: dict[str, Callable[..., Awaitable[int]]] = {"myserve.sdk": ours, "openai-python (async)": openais}


def pace(client: Callable[..., Any], url: str, streams: int, tokens: int, *, logprobs: bool) -> float:
    """Tokens a second of client CPU."""
    began = time.process_time()
    got: int = asyncio.run(client(url, streams, tokens, logprobs=logprobs))
    spent = time.process_time() - began
    assert got == streams * tokens, f"{got} tokens arrived, not {streams * tokens}"
    return got / spent


def pace_in(process: Executor, client: Callable[..., Any], *args: Any, **options: Any) -> float:
    """Measure in a process of the client's own, so that its garbage collector has no other objects to visit."""
    return process.submit(pace, client, *args, **options).result()


def pace_of_reference(python: str, url: str, streams: int, tokens: int, *, logprobs: bool) -> float:
    script = Path(__file__).with_name("reference.py")
    command = [python, str(script), url, str(streams), str(tokens), str(logprobs)]
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert done["tokens"] == streams * tokens, f"{done['tokens']} tokens arrived, not {streams * tokens}"
    return float(done["tokens"] / done["seconds"])


def flat_memory(url: str, samples: int) -> tuple[float, float]:
    """Peak memory in MB after a hundredth of the samples, and after all."""

    async def run(count: int) -> None:
        sampler = DeploymentSampler(url, "replay", concurrency_controller=FixedConcurrencyController(256))
        async for _ in sampler.sample_batch([[1, i] for i in range(count)], max_tokens=8):
            pass
        await sampler.aclose()

    peaks = []
    for count in (max(2000, samples // 100), samples):
        asyncio.run(run(count))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks[0], peaks[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", type=int, default=0, help="also draw this many samples and watch the memory"
    )
    parser.add_argument("--reference", default="", help="a Python that has the reference client")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    ours_end, theirs = spawn.Pipe()
    tokens = 8 if args.memory else args.tokens
    server = spawn.Process(target=serve, args=(tokens, theirs), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours_end.recv()}"
    processes = {name: ProcessPoolExecutor(1, mp_context=spawn) for name in CLIENTS}
    try:
        if args.memory:
            small, large = flat_memory(url, args.memory)
            print(f"peak memory: {small:.0f} MB at first, {large:.0f} MB after {args.memory:,} samples")
            return
        for logprobs in (False, True):
            rivals = {name: partial(pace_in, processes[name], client) for name, client in CLIENTS.items()}
            if args.reference:
                rivals["fireworks-ai, training SDK"] = partial(pace_of_reference, args.reference)
            paces: dict[str, list[float]] = {name: [] for name in rivals}
            for timed in (False, *[True] * args.rounds):  # the first round pays for imports
                for name, rival in rivals.items():
                    value = rival(url, args.streams, args.tokens, logprobs=logprobs)
                    paces[name] += [value] if timed else []
            medians = {name: statistics.median(values) for name, values in paces.items()}
            print(f"{args.streams} streams of {args.tokens} tokens, logprobs={logprobs}")
            for name, value in medians.items():
                print(
                    f"  {name:28} {value:10,.0f} tokens/s of CPU   ours ×{medians['myserve.sdk'] / value:.1f}"
                )
    finally:
        for process in processes.values():
            process.shutdown()
        server.terminate()


if __name__ == "__main__":
    main()
