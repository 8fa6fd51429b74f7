"""Measures ours beside its peers, in one run, on one model: `make bench`, or `python -m benchmarks --only decode8`.

Contenders take turns within each workload: on a machine whose speed drifts, only figures taken next to each other
have a ratio that means something. Before each run the machine is given time to become idle (`benchmarks.idle`).
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import ledger, roofline
from benchmarks.comparison import MORE, Comparison, table, workload_of
from benchmarks.contender import Contender
from benchmarks.idle import wait_until_idle
from benchmarks.model import HYBRID, model_folder
from benchmarks.peers import ROOT, Peer
from benchmarks.peers.ours import of_tree
from benchmarks.peers.registry import OURS, PEERS
from benchmarks.scenarios import (
    LOAD,
    Planned,
    beside_streams_figures,
    burst,
    capacity,
    poisson,
    poisson_figures,
    prompt_beside_streams,
)
from myserve.bench.figures import RequestTimes
from myserve.bench.load import BenchError
from myserve.bench.report import number
from myserve.bench.workload import PRESETS, Workload
from myserve.embedded import embedded_model_path

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)  # a log is wider than 80
COLD = "cold"
COLD_LENGTHS = (32, 64, 128, 256)  # prompts of which the first since a start is timed
IDLE_S = 10.0  # after a start, before the first of them
LATER = 3
BESIDE, POISSON = "beside-streams", "poisson"
SCENARIOS = (COLD, BESIDE, POISSON)
DEFAULT_PEERS = ("openvino",)
LAST_RUN = ROOT / "last-run.json"


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Of {', '.join([*PRESETS, *MORE, *SCENARIOS])}, or as 8x128:64@top_p; several times."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(PEERS)}, ours-int8, ours-exact-off, none; several times."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Another checkout of this repository, measured as one more contender.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A model's folder, or `embedded`, or `hybrid`. Default: the dense one that is made here."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Poisson arrivals a second. Default: 0.9 of what ours answers when all come at once."
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Runs of each; medians count.", min=1)] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the last run where it was cut.")] = False,
    note: Annotated[
        str | None, typer.Option(help="Append the result to LEDGER.md, under these words.")
    ] = None,
) -> None:
    """Print ours against each peer and against what this machine's memory and arithmetic allow."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit's end ends the servers too
    names = only or [*PRESETS, *MORE, *SCENARIOS]
    made: dict[str, Callable[[], Path]] = {
        "None": model_folder,
        "embedded": embedded_model_path,
        "hybrid": partial(model_folder, HYBRID),
    }
    folder = made[str(model)]() if str(model) in made else Path(str(model))
    workloads = {name: workload_of(name) for name in names if name not in SCENARIOS}
    contenders = [OURS["ours"], *([of_tree(base)] if base else [])]
    contenders += _peers(peer or DEFAULT_PEERS, folder, strict=peer is not None)
    result = _begin(resume, folder)
    console.print(f"[dim]{result.machine}[/]")
    with _running(contenders, folder, result) as running:
        if COLD in names:
            _measure_cold(running, result)
        for name, workload in workloads.items():
            _measure(name, workload, running, repeat, result)
            result.peak_gib |= {c.name: peak for c in running if (peak := c.peak_memory_gib()) is not None}
            result.save(LAST_RUN)
        if BESIDE in names:
            _measure_scenario(BESIDE, running, repeat, result, beside_streams_figures, prompt_beside_streams)
        if POISSON in names:
            result.rate = rate or result.rate or LOAD * _capacity(running[0])
            console.print(f"[dim]{result.rate:.3f} requests a second[/]")
            planned = partial(poisson, zlib.crc32(POISSON.encode()), result.rate)
            _measure_scenario(POISSON, running, repeat, result, poisson_figures, planned)
        result.peak_gib |= {c.name: peak for c in running if (peak := c.peak_memory_gib()) is not None}
        result.save(LAST_RUN)
    shown = [contender.name for contender in contenders]
    console.print(table(result, shown))
    for failure in result.failures:
        console.print(f"[red]failed[/] {failure}", markup=True)
    if note is not None:
        ledger.append(
            ledger.entry(note, commit=result.commit, when=ledger.today(), comparison=result, contenders=shown)
        )
    if result.failures:
        raise typer.Exit(1)


def _peers(names: Sequence[str], model: Path, *, strict: bool) -> Iterator[Peer]:
    """Yield those asked for; one that is not installed is an error if it was asked for by name, and else a remark."""
    for name in names:
        if name == "none":
            continue
        if name in OURS:
            yield OURS[name]
            continue
        if name not in PEERS:
            raise typer.BadParameter(f"no peer {name!r}: know {', '.join([*PEERS, *OURS, 'none'])}")
        if PEERS[name].is_installed(model):
            yield PEERS[name]
            continue
        remark = f"{name} is not installed here: python -m benchmarks.peers {name} --model {model}"
        if strict:
            raise typer.BadParameter(remark)
        console.print(f"[yellow]{remark}[/]")


def _begin(resume: bool, model: Path) -> Comparison:
    if resume and LAST_RUN.exists():
        last = Comparison.load(LAST_RUN)
        if last.commit == ledger.commit():
            last.failures.clear()
            return last
        console.print(f"[yellow]the last run was of {last.commit}: starting afresh[/]")
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    return Comparison(ledger.commit(), command, roofline.measure(), size=roofline.ModelSize.of_folder(model))


@contextmanager
def _running(peers: Sequence[Peer], model: Path, result: Comparison) -> Iterator[list[Contender]]:
    """Load all of them, one after the other; one that does not start is a failure of its own, not of the run."""
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
    """Time the first prompt of each length since the start, and later ones of that length, beside each other.

    Before the first of all everything is idle for `IDLE_S`, in which a server may get ready for what comes.
    """
    time.sleep(IDLE_S)
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
    before = {contender.name: contender.sampling_seconds() for contender in waiting}
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

    if workload.output_len > 1:
        shares = {
            contender.name: _share(before[contender.name], contender.sampling_seconds())
            for contender in waiting
        }
        result.sampling_share[name] = {who: share for who, share in shares.items() if share is not None}


def _share(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """Return the sampler's share of the steps between two readings of its server's counters."""
    if before is None or after is None or after[0] == before[0]:
        return None
    return (after[1] - before[1]) / (after[0] - before[0])


def _capacity(contender: Contender) -> float:
    """Return the requests a second that a contender answers when all come at once."""
    wait_until_idle()
    return capacity(contender.play(burst(zlib.crc32(b"burst"), requests=24), seed=0))


def _measure_scenario(
    name: str,
    running: Sequence[Contender],
    repeat: int,
    result: Comparison,
    figures: Callable[[Sequence[RequestTimes]], dict[str, float]],
    planned: Callable[[], Sequence[Planned]],
) -> None:
    """Make `repeat` rounds, in each of which every contender plays the load once, with the same prompts."""
    by = result.scenarios.setdefault(name, {})
    begun = {contender.name: len(by.setdefault(contender.name, [])) for contender in running}
    for round_number in range(repeat):
        for contender in running:
            if round_number < begun[contender.name]:
                continue
            result.busy = max(result.busy, wait_until_idle())
            try:
                traces = contender.play(planned(), seed=zlib.crc32(f"{name} {round_number}".encode()))
            except BenchError as error:
                result.failures.append(f"{name}: {error}")
                continue
            by[contender.name].append(figures(traces))
            told = ", ".join(f"{figure} {number(value)}" for figure, value in by[contender.name][-1].items())
            console.print(f"[dim]{name:12} {contender.name:16} {told}[/]")
        result.save(LAST_RUN)


if __name__ == "__main__":
    typer.run(main)
