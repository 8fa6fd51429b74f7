"""`myserve chat`: talk to a server; `--probs` colours each token by its probability."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from myserve.cli.client import ServerClient, ServerError
from myserve.cli.console import DEFAULT_URL, ProbabilityPrinter, err, fail, legend, out

__all__ = ["chat"]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; none: a conversation.")] = None,
    url: Annotated[str, typer.Option(help="The server's root.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="None: the first that the server lists.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    probs: Annotated[bool, typer.Option("--probs", help="Colour each token by its probability.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Of each answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Chat with a model; answers stream."""
    asked = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if probs:
        options["logprobs"] = True
    messages = [{"role": "system", "content": system}] if system else []
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    client = ServerClient(url, os.environ.get("MYSERVE_API_KEY", ""))
    try:
        asyncio.run(_talk(client, model, messages, prompt, options))
    except ServerError as error:
        fail(str(error))


async def _talk(
    client: ServerClient,
    model: str | None,
    messages: list[dict[str, str]],
    prompt: str | None,
    options: Mapping[str, Any],
) -> None:
    body = {"model": model or await client.first_model(), **options}
    if prompt is not None:
        await _answer(client, body, [*messages, {"role": "user", "content": prompt}])
        return
    err.print(f"[dim]{body['model']} at {client.url} · /new starts afresh · Ctrl-D ends[/]")
    if body.get("logprobs"):
        err.print(legend())
    turns = list(messages)
    while (line := await asyncio.to_thread(_read_line)) is not None:
        if line == "/new":
            turns = list(messages)
        elif line:
            turns.append({"role": "user", "content": line})
            turns.append({"role": "assistant", "content": await _answer(client, body, turns)})


def _read_line() -> str | None:
    try:
        return out.input("[bold]> [/]").strip()
    except EOFError:
        return None


async def _answer(client: ServerClient, body: Mapping[str, Any], messages: list[dict[str, str]]) -> str:
    """Stream one answer to the terminal and return it."""
    printer = ProbabilityPrinter()
    text = ""
    async for choice in client.stream_chat({**body, "messages": messages}):
        delta = choice.get("delta") or {}
        piece = delta.get("content") or ""
        text += piece
        entries = (choice.get("logprobs") or {}).get("content")
        if entries is None:
            out.print(piece, end="", markup=False, soft_wrap=True)
        else:
            out.print(printer.all(entries), end="", soft_wrap=True)
    out.print(printer.rest())
    return text
