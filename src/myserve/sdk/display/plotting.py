"""Charts as files, drawn by matplotlib (`pip install myserve[plot]`), which is imported at the first of them.

No window, no `pyplot` and no global state: a figure is made, drawn into and written. The same numbers are the same SVG
file, byte for byte. (SVG drawn by hand was rejected: two labels an axis, and no ticks.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myserve.errors import MyserveError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "PALE", "PlottingError", "Series", "check_chart_path", "drawn", "line_plot"]

Series = Mapping[str, Sequence[tuple[float, float]]]

COLOURS = ("#2e5e8c", "#c8693f", "#4f8a4c", "#8f5a9e", "#6b7280")
PALE = "#a9c3dd"  # of the first colour
FORMATS = (".svg", ".png", ".pdf")
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small files, which can be searched
    "svg.hashsalt": "myserve",  # ids inside the file, otherwise random
}


class PlottingError(MyserveError):
    """A chart cannot be drawn: matplotlib is not installed, or the file's ending names no format."""


def check_chart_path(path: str | Path) -> None:
    """Raise PlottingError where a chart could not be written to `path`: before a measurement that takes minutes."""
    if Path(path).suffix not in FORMATS:
        raise PlottingError(f"a chart's file ends with {', '.join(FORMATS)}, not {str(path)!r}")
    try:
        import matplotlib  # noqa: F401  # asked whether it is there
    except ImportError as error:
        raise PlottingError("charts need matplotlib: pip install 'myserve[plot]'") from error


@contextmanager
def drawn(
    path: str | Path, columns: int = 1, *, width: float = 8.0, height: float = 3.6
) -> Iterator[list[Axes]]:
    """Give the axes of a new figure, side by side; write it to `path` (.svg, .png or .pdf) at the end.

    `width` and `height` in inches. Raises PlottingError as `check_chart_path` does.
    """
    check_chart_path(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield list(figure.subplots(1, columns, squeeze=False)[0])
        stamp = {"Date": None} if Path(path).suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=stamp)


def line_plot(
    path: str | Path,
    series: Series,
    *,
    title: str,
    x: str,
    y: str,
    log_y: bool = False,
    percent: bool = False,
) -> None:
    """Write one line a series, (x, y) points, with ticks, a grid and a legend. `percent`: y is a share of 1.

    Raises ValueError for no points and for those that are not finite, PlottingError as `check_chart_path` does.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     chart = Path(folder) / "reward.svg"
    ...     line_plot(chart, {"reward": [(0, 0.1), (1, 0.4)]}, title="GRPO", x="step", y="reward")
    ...     "GRPO" in chart.read_text()
    True
    """
    points = [point for line in series.values() for point in line]
    if not points or not all(isfinite(value) for point in points for value in point):
        raise ValueError("a chart needs points, and finite ones")
    with drawn(path) as (axes,):
        for number, (name, line) in enumerate(series.items()):
            marker = "o" if len(line) <= 30 else ""
            axes.plot(
                *zip(*line, strict=True),
                label=name,
                color=COLOURS[number % len(COLOURS)],
                marker=marker,
                ms=3.5,
            )
        axes.set(title=title, xlabel=x, ylabel=y, yscale="log" if log_y else "linear")
        if percent:
            axes.yaxis.set_major_formatter("{x:.0%}")
        if len(series) > 1:
            axes.legend(loc="best")
