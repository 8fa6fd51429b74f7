"""A run to watch: a table that grows, sparklines above it; and the same numbers as files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from myserve.sdk import AdaptiveConcurrencyController, DeploymentSampler
from myserve.sdk.display.plotting import check_chart_path, line_plot

BARS = "▁▂▃▄▅▆▇█"
SHOWN = {
    "reward": "reward",
    "sampled": "held out, T=1",
    "greedy": "held out, greedy",
    "kl_to_start": "KL to start",
}
ROWS = 8


class Curve:
    """The figures of each step: on the screen, in `curve.jsonl`, and at the end in `curve.svg`.

    The file has nothing that depends on the clock, so two runs can be compared byte for byte.
    """

    def __init__(self, run: Path, steps: int) -> None:
        self._run, self._steps = run, steps
        self._rows: list[dict[str, float]] = []
        self._began = time.monotonic()
        self._pace = self._window = 0.0
        self._live = Live(console=Console(stderr=True), refresh_per_second=4)

    def __enter__(self) -> Curve:
        check_chart_path(self._run / "curve.svg")
        (self._run / "curve.jsonl").write_text("")
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        series = {
            title: [(row["step"], row[name]) for row in self._rows if name in row]
            for name, title in SHOWN.items()
            if name != "kl_to_start"
        }
        if self._rows:
            line_plot(
                self._run / "curve.svg",
                series,
                title="GRPO on two-digit sums",
                x="training step",
                y="answers that are right",
                percent=True,
            )

    @contextmanager
    def sampling(self, sampler: DeploymentSampler, window: AdaptiveConcurrencyController) -> Iterator[None]:
        """Around a step's rollouts: their pace and the window, which depend on the clock: shown, not written."""
        began, before = time.monotonic(), sampler.stats.completion_tokens
        yield
        self._pace = (sampler.stats.completion_tokens - before) / (time.monotonic() - began)
        self._window = window.window

    def add(self, step: int, figures: dict[str, float]) -> None:
        row = {"step": step, **figures}
        self._rows.append(row)
        with (self._run / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._live.update(self._picture())

    def _picture(self) -> RenderableType:
        table = Table(box=None, header_style="dim")
        for title in ("step", *SHOWN.values(), "mismatch"):
            table.add_column(title, justify="right")
        for row in self._rows[-ROWS:]:
            cells = [f"{row[name]:.4f}" if name in row else "" for name in SHOWN]
            table.add_row(f"{row['step']:.0f}", *cells, _mismatch(row.get("mismatch")))
        foot = Table.grid(padding=(0, 2))
        minutes = (time.monotonic() - self._began) / 60
        pace = f"{self._pace:,.0f} tokens/s · window {self._window:.0f} · {minutes:.1f} min"
        foot.add_row(ProgressBar(self._steps, len(self._rows) - 1, width=40), Text(pace, style="dim"))
        lines = [
            Text.assemble((f"{title:>18} ", "dim"), self._sparkline(name)) for name, title in SHOWN.items()
        ]
        return Group(*lines, table, foot)

    def _sparkline(self, name: str) -> str:
        values = [row[name] for row in self._rows if name in row][-60:]
        if not values:
            return ""
        low, high = min(values), max(values)
        return (
            "".join(BARS[int((v - low) / ((high - low) or 1) * (len(BARS) - 1))] for v in values)
            + f" {values[-1]:.3f}"
        )


def _mismatch(value: float | None) -> Text:
    if value is None:
        return Text("")
    return Text("exactly 0", style="green") if value == 0 else Text(f"{value:.1e}", style="red")
