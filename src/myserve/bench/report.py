"""Shows figures to a person: a table in the terminal, a chart in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from myserve.bench.figures import Figures
from myserve.sdk.display.plotting import COLOURS, PALE, drawn

__all__ = ["chart", "number", "table"]


def table(results: Mapping[str, Figures]) -> Table:
    """Return a table with a row for each workload."""
    # no wider than 80 columns
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("workload", no_wrap=True)
    for name in ("TTFT", "p99", "between", "p90", "p99", "ms/step", "tok/s", "prefill", "req/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for label, f in results.items():
        values = (f.ttft_p50, f.ttft_p99, f.inter_token_p50, f.inter_token_p90, f.inter_token_p99)
        rates = (f.ms_per_step, f.tokens_per_s, f.prefill_tokens_per_s, f.requests_per_s)
        shown.add_row(label, *map(number, (*values, *rates)))
    shown.caption = "ms, p50 unless said; between: one token to the next; prefill: prompt tok/s"
    return shown


def number(value: float | None) -> str:
    """Return a value with three significant digits.

    >>> number(1234.5), number(98.76), number(0.1234), number(None)
    ('1234', '98.8', '0.123', '–')
    """
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


def chart(results: Mapping[str, Figures], title: str, path: str | Path) -> None:
    """Write a chart to `path` (.svg, .png or .pdf): tokens a second as bars, the time between tokens as ranges.

    A range goes from p50 to p99, with a mark at p90, in ms. Raises `PlottingError` without matplotlib.

    >>> import tempfile
    >>> from myserve.bench.figures import RequestTimes, figures
    >>> run = figures([RequestTimes(0.0, (0.5, 0.6, 0.7), 3, 10)], requests=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     chart({"1x10:3": run}, "a & b", f"{folder}/run.svg")
    ...     "a &amp; b" in Path(f"{folder}/run.svg").read_text()
    True
    """
    places = range(len(results))
    with drawn(path, columns=2, width=9.0, height=1.6 + 0.42 * len(results)) as (left, right):
        rates = [f.tokens_per_s for f in results.values()]
        bars = left.barh(places, rates, height=0.5, color=COLOURS[0])
        left.bar_label(bars, [number(rate) for rate in rates], padding=4, color="#374151")
        left.set(title=title, xlabel="completion tokens a second")
        left.set_yticks(places, list(results))
        left.margins(x=0.15)
        for place, f in zip(places, results.values(), strict=True):
            if f.inter_token_p50 is None or f.inter_token_p90 is None or f.inter_token_p99 is None:
                continue  # one token an answer: nothing lies between
            right.plot(
                [f.inter_token_p50, f.inter_token_p99],
                [place] * 2,
                lw=7,
                solid_capstyle="butt",
                color=PALE,
            )
            right.plot([f.inter_token_p90], [place], "|", ms=14, mew=2.5, color=COLOURS[0])
        right.set(title="p50 to p99, mark: p90", xlabel="between tokens, ms")
        right.set_yticks(places, [""] * len(results))
        right.set_xlim(left=0)
        for axes in (left, right):
            axes.set_ylim(len(results) - 0.5, -0.5)  # the first workload on top, as in the table
            axes.grid(visible=False, axis="y")
