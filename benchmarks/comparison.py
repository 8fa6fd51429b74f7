"""Compares contenders: for each workload one figure, ours over the peer's, and the bound of the hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.roofline import Machine, bound
from myserve.bench.figures import Figures, median_of
from myserve.bench.report import number
from myserve.bench.workload import Workload


def headline(workload: Workload) -> str:
    """Return the figure that tells contenders apart: prefill speed, the step, or throughput where `n` shares a prompt.

    >>> [headline(Workload.parse(name)) for name in ("prefill512", "decode8", "n8")]
    ['prefill_tokens_per_s', 'ms_per_step', 'tokens_per_s']
    """
    if workload.output_len == 1:
        return "prefill_tokens_per_s"
    return "ms_per_step" if workload.n == 1 else "tokens_per_s"


@dataclass(slots=True)
class Comparison:
    """Hold all runs so far. Saved after each workload, so that a run that was cut can be taken up again."""

    commit: str
    command: str
    machine: Machine
    runs: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)  # workload -> contender -> runs
    ready_s: dict[str, float] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)
    # contender -> prompt length -> ms to the first token: of the first such prompt since the start, and of later ones
    cold_ms: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    busy: float = 0.0  # the largest share of the CPU that something else used when a run began
    failures: list[str] = field(default_factory=list)

    def rows(self) -> list[Row]:
        return [
            Row(
                name,
                (figure := headline(Workload.parse(name))),
                {contender: value for contender, runs in by.items() if (value := _median(runs, figure))},
                {contender: median_of(runs).tokens_per_s for contender, runs in by.items() if runs},
                bound(self.machine, Workload.parse(name), figure),
            )
            for name, by in self.runs.items()
        ]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Comparison:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        record["machine"] = Machine(**record["machine"])
        record["runs"] = {
            workload: {contender: [Figures(**run) for run in runs] for contender, runs in by.items()}
            for workload, by in record["runs"].items()
        }
        record["cold_ms"] = {
            contender: {length: (first, later) for length, (first, later) in by.items()}
            for contender, by in record["cold_ms"].items()
        }
        return cls(**record)

    def cold_rows(self, contenders: Sequence[str]) -> list[list[str]]:
        """Return a line for each prompt length: its name, its unit, and `first (later)` of each contender."""
        lengths = sorted({length for by in self.cold_ms.values() for length in by}, key=int)
        return [
            [f"first prompt of {length} (later)", "ms", *(self._cold(name, length) for name in contenders)]
            for length in lengths
        ]

    def _cold(self, contender: str, length: str) -> str:
        if length not in self.cold_ms.get(contender, {}):
            return "–"
        first, later = self.cold_ms[contender][length]
        return f"{number(first)} ({number(later)})"


def _median(runs: Sequence[Figures], figure: str) -> float | None:
    value = getattr(median_of(runs), figure) if runs else None
    return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class Row:
    """Hold one workload: the headline figure and the tokens a second of each contender, and what the machine allows."""

    workload: str
    figure: str
    values: Mapping[str, float]
    tokens_per_s: Mapping[str, float]
    bound: float

    @property
    def unit(self) -> str:
        return "ms/step" if self.figure == "ms_per_step" else "tok/s"

    def ratio(self, peer: str) -> float | None:
        """Return ours over the peer's: below 1 is better for a step, above 1 for tokens a second.

        >>> Row("decode8", "ms_per_step", {"ours": 60.0, "openvino": 80.0}, {}, 40.0).ratio("openvino")
        0.75
        """
        if "ours" not in self.values or peer not in self.values:
            return None
        return self.values["ours"] / self.values[peer]

    def share_of_bound(self) -> float | None:
        """Return how much of the hardware's best ours reaches, 0 to 1.

        >>> Row("decode8", "ms_per_step", {"ours": 60.0}, {}, 40.0).share_of_bound()
        0.6666666666666666
        """
        if "ours" not in self.values:
            return None
        share = self.bound / self.values["ours"]
        return share if self.figure == "ms_per_step" else 1 / share


def header(contenders: Sequence[str]) -> list[str]:
    ratios = [f"ours / {name}" for name in contenders if name != "ours"]
    return ["workload", "unit", *contenders, *ratios, "bound", "of bound"]


def cells(row: Row, contenders: Sequence[str]) -> list[str]:
    """Return one line of the table: the headline figure, and behind it tokens a second where that is another."""

    def value(name: str) -> str:
        if name not in row.values:
            return "–"
        also = f" · {number(row.tokens_per_s[name])} tok/s" if row.figure == "ms_per_step" else ""
        return number(row.values[name]) + also

    def ratio(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    ratios = [ratio(row.ratio(name)) for name in contenders if name != "ours"]
    values = [value(name) for name in contenders]
    return [row.workload, row.unit, *values, *ratios, number(row.bound), ratio(row.share_of_bound())]


def table(comparison: Comparison, contenders: Sequence[str]) -> Table:
    """Return the table for the terminal."""
    others = f"at most {comparison.busy:.0%} of the CPU in use before a run"
    caption = f"{comparison.machine}; commit {comparison.commit}; medians; {others}"
    shown = Table(*header(contenders), caption=caption)
    for row in comparison.rows():
        shown.add_row(*cells(row, contenders))
    for line in comparison.cold_rows(contenders):
        shown.add_row(*line)
    for label, values in (("ready, s", comparison.ready_s), ("peak GiB", comparison.peak_gib)):
        shown.add_row(label, "", *(number(values.get(name)) for name in contenders))
    return shown
