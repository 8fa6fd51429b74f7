"""`myserve sample`: prompts or a batch in JSONL to samples in JSONL; a killed run resumes from its journal."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import typer

from myserve.cli.client import ServerClient
from myserve.cli.console import DEFAULT_URL, err, fail
from myserve.cli.sample_batch import BatchSample, is_batch_file, read_lines
from myserve.errors import MyserveError
from myserve.sdk import (
    AdaptiveConcurrencyController,
    BatchGroup,
    DeploymentSampler,
    FixedConcurrencyController,
)

__all__ = ["sample"]

CONCURRENT_TOKENIZE_REQUESTS = 16


def sample(
    context: typer.Context,
    prompts: Annotated[
        Path,
        typer.Argument(
            help="JSONL with prompt, messages or prompt_token_ids, or OpenAI's batch lines; - is stdin."
        ),
    ],
    output: Annotated[
        Path, typer.Argument(help="JSONL, one sample a line, in the prompts' order; - is stdout.")
    ],
    url: Annotated[list[str] | None, typer.Option(help="The server's root; several share the load.")] = None,
    model: Annotated[str | None, typer.Option(help="None: the first that the server lists.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Samples of each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Of each sample.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option()] = 0,
    max_seq_len: Annotated[int | None, typer.Option(help="Longer samples are dropped, and counted.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A stop string; may be given several times.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Of every token.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the run: each sample gets its own from it.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Samples in flight. None: follows the server's queue.")
    ] = None,
    journal: Annotated[Path | None, typer.Option(help="A killed run goes on from this file.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds for the whole run.")] = None,
) -> None:
    """Sample completions of many prompts, or answer the lines of a batch in OpenAI's form.

    A batch's lines say themselves what is asked of which route; answers and errors come in their order.
    """
    urls = url or [DEFAULT_URL]
    api_key = os.environ.get("MYSERVE_API_KEY", "")
    controller = (
        AdaptiveConcurrencyController() if concurrency is None else FixedConcurrencyController(concurrency)
    )
    try:
        text = sys.stdin.read() if str(prompts) == "-" else prompts.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{prompts} cannot be read: {error}")
    if is_batch_file(text):
        _refuse_given(context)
        _answer_batch(BatchInputs(text, prompts, output, urls, api_key, journal, concurrency))
        return
    options: dict[str, Any] = {"n": n, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    options |= {"top_k": top_k, "stop": stop, "logprobs": logprobs, "max_seq_len": max_seq_len, "seed": seed}

    async def run() -> int:
        client = ServerClient(urls[0], api_key)
        name = model or await client.first_model()
        ids = await _tokenize(client, name, _read(text, prompts))
        sampler = DeploymentSampler(urls, name, api_key, concurrency_controller=controller)
        batch = sampler.sample_batch(
            ids, journal=journal, deadline=deadline, progress=True, on_error="keep", **options
        )
        with _opened(output) as file:
            writer = _InOrder(file)
            async with aclosing(aiter(batch)) as groups:
                async for group in groups:
                    writer.write(group)
        _report(sampler)
        return sampler.stats.failed

    try:
        failed = asyncio.run(run())
    except (MyserveError, ValueError, OSError) as error:
        fail(str(error))
    if failed:
        raise typer.Exit(1)


class BatchInputs(NamedTuple):
    """A batch, and where it is asked and answered."""

    text: str
    prompts: Path
    output: Path
    urls: list[str]
    api_key: str
    journal: Path | None
    concurrency: int | None


def _answer_batch(given: BatchInputs) -> None:
    """Answer a batch. Its journal is beside the output unless another is named, and goes when all is answered."""
    own = Path(f"{given.output}.journal") if str(given.output) != "-" and given.journal is None else None
    try:
        lines = read_lines(given.text, str(given.prompts))
        with _opened(given.output) as file:
            run = BatchSample(given.urls, given.api_key, lines, file, given.journal or own, given.concurrency)
            asyncio.run(run.run())
    except (MyserveError, ValueError, OSError) as error:
        fail(str(error))
    if own is not None:
        own.unlink(missing_ok=True)
    failed = f" · [red]{run.num_failed:,} failed[/]" if run.num_failed else ""
    err.print(f"[dim]{len(lines):,} lines · {run.num_asked:,} asked{failed}[/]")
    if run.num_failed:
        raise typer.Exit(1)


def _refuse_given(context: typer.Context) -> None:
    """Refuse options that a batch's lines have themselves."""
    given = [
        "--" + name.replace("_", "-")
        for name in context.params
        if name not in ("prompts", "output", "url", "journal", "concurrency") and _is_given(context, name)
    ]
    if given:
        fail(f"{', '.join(given)}: the lines of a batch say that themselves, in their body")


def _is_given(context: typer.Context, name: str) -> bool:
    # by its name: typer may bring a click of its own
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _read(text: str, path: Path) -> list[Mapping[str, Any]]:
    prompts: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(entry, dict) or not entry.keys() & {"prompt", "messages", "prompt_token_ids"}:
            raise ValueError(f"{path}, line {number}: needs prompt, messages or prompt_token_ids")
        prompts.append(entry)
    return prompts


async def _tokenize(
    client: ServerClient, model: str, prompts: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """Return the prompts' ids, by the server's own tokenizer and chat template."""
    places = asyncio.Semaphore(CONCURRENT_TOKENIZE_REQUESTS)

    async def one(entry: Mapping[str, Any]) -> list[int]:
        if "prompt_token_ids" in entry:
            return list(entry["prompt_token_ids"])
        messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
        async with places:
            return list((await client.post("/tokenize", {"model": model, "messages": messages}))["tokens"])

    return list(await asyncio.gather(*map(one, prompts)))


class _InOrder:
    """Writes groups in the order of their prompts, as soon as those before them are there."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._early: dict[int, BatchGroup] = {}
        self._next = 0

    def write(self, group: BatchGroup) -> None:
        self._early[group.prompt_index] = group
        while (ready := self._early.pop(self._next, None)) is not None:
            self._next += 1
            for completion in ready.completions:
                self._line(ready.prompt_index, completion.to_json())
            for error in ready.completions.failures:
                self._line(ready.prompt_index, {"index": error.index, "error": str(error)})

    def _line(self, prompt_index: int, fields: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"prompt_index": prompt_index, **fields}, ensure_ascii=False) + "\n")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if str(path) == "-":
        yield sys.stdout
        return
    with path.open("w", encoding="utf-8") as file:
        yield file


def _report(sampler: DeploymentSampler) -> None:
    stats = sampler.stats
    parts = [
        f"{stats.samples:,} samples",
        f"{stats.completion_tokens:,} tokens",
        f"{stats.requests:,} requests",
    ]
    parts += [f"{stats.dropped:,} over max_seq_len"] if stats.dropped else []
    parts += [f"[red]{stats.failed:,} failed[/]"] if stats.failed else []
    err.print(f"[dim]{' · '.join(parts)}[/]")
