"""Measures ours beside its peers, in one run, on one model: `make bench`, or `python -m benchmarks --only decode8`.

Contenders take turns within each workload: on a machine whose speed drifts, only figures taken next to each other
have a ratio that means something. Before each run the machine is given time to become idle (`benchmarks.idle`).
"""

from __future__ import annotations

import shlex
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import ledger, roofline
from benchmarks.comparison import Comparison, table
from benchmarks.contender import Contender
from benchmarks.idle import wait_until_idle
from benchmarks.model import model_folder
from benchmarks.peers import ROOT, Peer
from benchmarks.peers.registry import OURS, PEERS
from myserve.bench.load import BenchError
from myserve.bench.workload import PRESETS, Workload

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)  # a log is wider than 80
COLD_LENGTHS = (32, 64, 128, 256)  # prompts of which the first since a start is timed
LATER = 3
DEFAULT_PEERS = ("openvino",)
LAST_RUN = ROOT / "last-run.json"


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PRESETS)}, or as 8x128:64@top_p; several times.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PEERS)}, ours-exact-off, none; several times.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Runs of each; medians count.", min=1)] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the last run where it was cut.")] = False,
    note: Annotated[
        str | None, typer.Option(help="Append the result to LEDGER.md, under these words.")
    ] = None,
) -> None:
    """Print ours against each peer and against what this machine's memory and arithmetic allow."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit's end ends the servers too
    workloads = {name: Workload.parse(name) for name in only or PRESETS}
    contenders = [OURS["ours"], *_peers(peer or DEFAULT_PEERS, strict=peer is not None)]
    names = [contender.name for contender in contenders]
    result = _begin(resume)
    console.print(f"[dim]{result.machine}[/]")
    with _running(contenders, result) as running:
        _measure_cold(running, result)
        for name, workload in workloads.items():
            _measure(name, workload, running, repeat, result)
            result.peak_gib |= {c.name: peak for c in running if (peak := c.peak_memory_gib()) is not None}
            result.save(LAST_RUN)
    console.print(table(result, names))
    for failure in result.failures:
        console.print(f"[red]failed[/] {failure}", markup=True)
    if note is not None:
        ledger.append(
            ledger.entry(note, commit=result.commit, when=ledger.today(), comparison=result, contenders=names)
        )
    if result.failures:
        raise typer.Exit(1)


def _peers(names: Sequence[str], *, strict: bool) -> Iterator[Peer]:
    """Yield those asked for; one that is not installed is an error if it was asked for by name, and else a remark."""
    for name in names:
        if name == "none":
            continue
        if name in OURS:
            yield OURS[name]
            continue
        if name not in PEERS:
            raise typer.BadParameter(f"no peer {name!r}: know {', '.join([*PEERS, *OURS, 'none'])}")
        if PEERS[name].is_installed:
            yield PEERS[name]
            continue
        remark = f"{name} is not installed here: python -m benchmarks.peers {name}"
        if strict:
            raise typer.BadParameter(remark)
        console.print(f"[yellow]{remark}[/]")


def _begin(resume: bool) -> Comparison:
    if resume and LAST_RUN.exists():
        last = Comparison.load(LAST_RUN)
        if last.commit == ledger.commit():
            last.failures.clear()
            return last
        console.print(f"[yellow]the last run was of {last.commit}: starting afresh[/]")
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    return Comparison(ledger.commit(), command, roofline.measure())


@contextmanager
def _running(peers: Sequence[Peer], result: Comparison) -> Iterator[list[Contender]]:
    """Load all of them, one after the other; one that does not start is a failure of its own, not of the run."""
    model: Path = model_folder()
    running: list[Contender] = []
    try:
        for peer in peers:
            contender = Contender(peer, model)
            running.append(contender)
            try:
                result.ready_s[peer.name] = contender.wait_until_ready()
                console.print(f"[dim]{peer.name} ready after {result.ready_s[peer.name]:.1f} s[/]")
            except BenchError as error:
                result.failures.append(str(error))
                running.remove(contender)
                contender.stop()
        yield running
    finally:
        for contender in running:
            contender.stop()


def _measure_cold(running: Sequence[Contender], result: Comparison) -> None:
    """Time the first prompt of each length since the start, and later ones of that length, beside each other."""
    for length in COLD_LENGTHS:
        workload = Workload(1, length, 1)
        for contender in running:
            result.busy = max(result.busy, wait_until_idle())
            seeds = [zlib.crc32(f"cold {length} {number}".encode()) for number in range(1 + LATER)]
            try:
                first, *later = [contender.run(workload, seed).ttft_p50 for seed in seeds]
            except BenchError as error:
                result.failures.append(f"first prompt of {length}: {error}")
                continue
            result.cold_ms.setdefault(contender.name, {})[str(length)] = (first, median(later))
            times = f"{first:.0f} ms, later {median(later):.0f} ms"
            console.print(f"[dim]first prompt of {length:4} {contender.name:16} {times}[/]")


def _measure(
    name: str, workload: Workload, running: Sequence[Contender], repeat: int, result: Comparison
) -> None:
    """Warm each up, then make `repeat` rounds in which each contender runs once."""
    by = result.runs.setdefault(name, {})
    waiting = [contender for contender in running if len(by.get(contender.name, ())) < repeat]
    for contender in waiting:
        by[contender.name] = []
    for round_number in range(repeat + 1):
        for contender in list(waiting):
            shape = workload.warm_up() if round_number == 0 else workload
            # Of the workload's name too: 32 streams would else begin with the prompts that 8 had, and a prefix
            # cache would do the work.
            seed = zlib.crc32(f"{name} {round_number}".encode())
            result.busy = max(result.busy, wait_until_idle())
            try:
                run = contender.run(shape, seed)
            except BenchError as error:
                result.failures.append(f"{name}: {error}")
                waiting.remove(contender)
                continue
            if round_number:
                by[contender.name].append(run)
                step = "" if run.ms_per_step is None else f"{run.ms_per_step:.1f} ms/step  "
                speed = f"{run.tokens_per_s:.1f} tok/s  prefill {run.prefill_tokens_per_s:.0f} tok/s"
                console.print(f"[dim]{name:12} {contender.name:16} {step}{speed}[/]")


if __name__ == "__main__":
    typer.run(main)
