"""Compares contenders: for each workload one figure, ours over the peer's, and the bound of the hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.roofline import RANDOM, Machine, ModelSize, bound
from myserve.bench.figures import Figures, median_of
from myserve.bench.report import number
from myserve.bench.workload import Workload

# Beside the presets of `myserve bench`. Many long contexts share their prompt: apart, it would take minutes.
MORE: Mapping[str, str] = {
    "prefill128": "1x128:1",
    "scale32": "32x32:24",
    "scale64": "64x32:24",
    "long4k": "1x4096:32",
    "long8k": "1x8192:32",
    "long4k-8": "1x4096:32@t1,n=8",
    "long8k-8": "1x8192:32@t1,n=8",
}
LONG = 1024  # tokens of a prompt whose prefill hides what decoding costs


def workload_of(name: str) -> Workload:
    """Return the workload of a name in `MORE`, of a preset's, or of the short form. Raises RequestError.

    >>> workload_of("scale64") == workload_of("64x32:24")
    True
    """
    return Workload.parse(MORE.get(name, name))


def headline(workload: Workload) -> str:
    """Return the figure that tells contenders apart: prefill speed, the step, or throughput where `n` shares a prompt.

    >>> [headline(workload_of(name)) for name in ("prefill512", "decode8", "n8")]
    ['prefill_tokens_per_s', 'ms_per_step', 'tokens_per_s']
    """
    if workload.output_len == 1:
        return "prefill_tokens_per_s"
    return "ms_per_step" if workload.n == 1 or workload.prompt_len > LONG else "tokens_per_s"


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
    # scenario -> contender -> of each run, its figures by name
    scenarios: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    # workload -> contender -> share of the steps' time that its sampler took
    sampling_share: dict[str, dict[str, float]] = field(default_factory=dict)
    rate: float | None = None  # requests a second of Poisson arrivals
    size: ModelSize = RANDOM
    busy: float = 0.0  # the largest share of the CPU that something else used when a run began
    failures: list[str] = field(default_factory=list)

    def rows(self) -> list[Row]:
        return [
            Row(
                name,
                (figure := headline(workload_of(name))),
                {contender: value for contender, runs in by.items() if (value := _median(runs, figure))},
                {contender: median_of(runs).tokens_per_s for contender, runs in by.items() if runs},
                bound(self.machine, workload_of(name), figure, self.size),
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
        record["size"] = ModelSize(**record["size"])
        return cls(**record)

    def scenario_rows(self, contenders: Sequence[str]) -> list[list[str]]:
        """Return a line for each figure of each scenario: medians, and the spread where there are several runs."""
        lines = []
        for scenario, by in self.scenarios.items():
            figures = dict.fromkeys(name for runs in by.values() for run in runs for name in run)
            for figure in figures:
                values = [spread([run[figure] for run in by.get(name, ())]) for name in contenders]
                lines.append([f"{scenario}: {figure}", "" if "," in figure else "ms", *values])
        for workload, shares in self.sampling_share.items():
            cells_of = [f"{shares[name]:.1%}" if name in shares else "–" for name in contenders]
            lines.append([f"{workload}: the sampler's share of its steps", "", *cells_of])
        return lines

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


def spread(values: Sequence[float]) -> str:
    """Return the median, and behind it the least and the most of several.

    >>> spread([300.0, 250.0, 260.0]), spread([5.0]), spread([])
    ('260 (250 to 300)', '5', '–')
    """
    if not values:
        return "–"
    middle = number(median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


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
    for line in [*comparison.cold_rows(contenders), *comparison.scenario_rows(contenders)]:
        shown.add_row(*line)
    for label, values in (("ready, s", comparison.ready_s), ("peak GiB", comparison.peak_gib)):
        shown.add_row(label, "", *(number(values.get(name)) for name in contenders))
    return shown
