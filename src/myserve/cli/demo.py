"""`make demo`: serve the embedded model, send it the original specification's prompts, show probabilities."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.table import Table
from rich.text import Text

from myserve.cli.client import ServerClient, ServerError
from myserve.cli.console import ProbabilityPrinter, colour_of, err, legend, out
from myserve.sdk import AdaptiveConcurrencyController, DeploymentSampler

__all__ = ["main"]

USUAL_PORT = 8000
START_TIMEOUT = 120.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m myserve.cli.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the answers instead of staying up")
    once = parser.parse_args().once
    began = time.monotonic()
    with served_model(free_port()) as (url, server):
        try:
            asyncio.run(show(url, server, began))
            if not once:
                out.print("[dim]serving until Ctrl-C[/]")
                server.wait()
        except KeyboardInterrupt:
            out.print()
        except (ServerError, ServerDiedError) as error:
            err.print(Text(f"error: {error}", style="red"), soft_wrap=True)
            return 1
    return 0


class ServerDiedError(RuntimeError):
    """The server ended, or did not get ready in time."""


def free_port() -> int:
    """Return the usual port if it is free, else any free one."""
    for port in (USUAL_PORT, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as listener:
                return int(listener.getsockname()[1])
        except OSError:
            continue
    raise ServerDiedError("no free port on 127.0.0.1")


@contextmanager
def served_model(port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `myserve serve` as a process of its own, which ends with the block."""
    # no progress bar for four megabytes
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "myserve", "serve", "--port", str(port)]
    server = subprocess.Popen(command, env=environment)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


async def show(url: str, server: subprocess.Popen[bytes], began: float) -> None:
    """Show three conversations, then how to go on."""
    client = ServerClient(url)
    with out.status("starting the server on the embedded model"):
        await until_ready(client, server)
    model = await client.first_model()
    out.print(f"ready after {time.monotonic() - began:.1f} s")
    out.print(legend(), end="\n\n")
    await count_to_three(client, model)
    await say_a_color(client, model)
    await solve(client, model)
    out.print(how_to_go_on(url, model), soft_wrap=True)
    await client.aclose()


async def until_ready(client: ServerClient, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        if server.poll() is not None:
            raise ServerDiedError(f"the server ended with status {server.returncode} before it was ready")
        try:
            await client.get("/health")
            await client.get("/ready")
            return
        except ServerError as error:
            if time.monotonic() > deadline:
                raise ServerDiedError(
                    f"the server is not ready after {START_TIMEOUT:.0f} s: {error}"
                ) from error
        await asyncio.sleep(0.05)


async def count_to_three(client: ServerClient, model: str) -> None:
    """Show one answer, with the alternatives that each token had."""
    answer = await client.post(
        "/v1/chat/completions",
        {
            "model": model,
            "messages": said("Count to three:"),
            "max_tokens": 16,
            "temperature": 0.7,
            "top_p": 0.95,
            "top_k": 50,
            "seed": 1337,
            "logprobs": True,
            "top_logprobs": 5,
        },
    )
    entries = answer["choices"][0]["logprobs"]["content"]
    asked("Count to three:", "seed 1337, five alternatives a token")
    out.print(ProbabilityPrinter().all(entries))
    out.print(alternatives(entries), end="\n\n")


def alternatives(entries: list[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each token: it and those of its five alternatives that had a chance."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("token", "probability", "alternatives"):
        table.add_column(column, justify="right" if column == "probability" else "left")
    for entry in entries:
        p = probability(entry)
        others = [
            Text(f"{top['token']!r} {probability(top):.1%}", "dim")
            for top in entry["top_logprobs"]
            if top["token_id"] != entry["token_id"] and probability(top) >= 0.001
        ]
        table.add_row(Text(repr(entry["token"]), colour_of(p)), f"{p:.1%}", Text("  ").join(others))
    return table


async def say_a_color(client: ServerClient, model: str) -> None:
    """Stream an answer: tokens are printed as they arrive."""
    asked("Say a color:", "streamed, seed 7")
    printer = ProbabilityPrinter()
    async for entry in streamed_entries(
        client,
        {
            "model": model,
            "messages": said("Say a color:"),
            "max_tokens": 16,
            "temperature": 1.0,
            "top_p": 0.9,
            "logprobs": True,
            "top_logprobs": 3,
            "seed": 7,
        },
    ):
        out.print(printer.text(entry), end="")
    out.print(printer.rest(), end="\n\n")


async def streamed_entries(client: ServerClient, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    async for choice in client.stream_chat(body):
        for entry in (choice.get("logprobs") or {}).get("content") or ():
            yield entry


async def solve(client: ServerClient, model: str) -> None:
    """Draw four samples of one prompt through the SDK, as a trainer does: one prefill, ids, logprobs.

    A trainer has its tokenizer at hand and calls `sample_with_tokens(messages)`; here the server tokenizes, for
    importing transformers would take longer than all the rest.
    """
    prompt = await client.post("/tokenize", {"model": model, "messages": said("Solve: 2+2=")})
    sampler = DeploymentSampler(
        inference_url=client.url,
        model=model,
        concurrency_controller=AdaptiveConcurrencyController(initial_window=16),
    )
    asked("Solve: 2+2=", "four samples through DeploymentSampler")
    async with sampler:
        for c in await sampler.sample_with_prompt_tokens(
            prompt["tokens"], n=4, max_tokens=32, temperature=0.7, seed=7, logprobs=True
        ):
            likelihood = sum(c.inference_logprobs or ())
            out.print(
                Text.assemble(
                    (c.text, "bold"),
                    (f"   {c.completion_len} tokens, logprob {likelihood:.4f}, {c.finish_reason}", "dim"),
                )
            )
    out.print()


def how_to_go_on(url: str, model: str) -> Text:
    curl = (
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' "
        f"""-d '{{"model": "{model}", "messages": [{{"role": "user", "content": "hello"}}], "seed": 1}}'"""
    )
    python = (
        f'openai.OpenAI(base_url="{url}/v1", api_key="none").chat.completions.create(\n'
        f'    model="{model}", messages=[{{"role": "user", "content": "hello"}}], seed=1, logprobs=True)'
    )
    return Text.assemble(
        ("listening at ", "dim"), (url, "bold"), "\n\n", (curl, ""), "\n\n", (python, ""), "\n\n",
        (f"myserve chat --probs --url {url}", ""), "\n",
    )  # fmt: skip


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def asked(prompt: str, how: str) -> None:
    out.print(Text.assemble((prompt, "bold"), (f"   {how}", "dim")))


def probability(entry: Mapping[str, Any]) -> float:
    return math.exp(min(0.0, float(entry["logprob"])))


if __name__ == "__main__":
    sys.exit(main())
