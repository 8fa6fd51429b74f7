"""A line chart as SVG text: enough for the plots of this package, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite, log10

COLOURS = ("#2e5e8c", "#d08770", "#6a994e", "#8f5a9e", "#888888")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 280, 64, 16, 44, 40
FONT = 'font-family="sans-serif" font-size="12"'
FLOOR = 1e-9  # what a logarithmic axis shows for zero

Series = Mapping[str, Sequence[tuple[float, float]]]


def line_chart(series: Series, *, title: str, x: str, y: str, log_y: bool = False) -> str:
    """One polyline a series, with a legend; axes are labelled at their ends. Points: (x, y), any finite numbers.

    >>> svg = line_chart({"reward": [(0, 0.1), (1, 0.4)]}, title="GRPO", x="step", y="reward")
    >>> svg.startswith("<svg"), svg.count("<polyline")
    (True, 1)
    """
    points = [point for line in series.values() for point in line]
    if not points or not all(isfinite(value) for point in points for value in point):
        raise ValueError("a chart needs points, and finite ones")
    xs = [px for px, _ in points]
    ys = [_scaled(py, log_y) for _, py in points]
    x_axis, y_axis = (
        _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT),
        _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#bbb"/>',
        _label(LEFT, 16, title, "#222"),
    ]
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = " ".join(f"{x_axis(px):.1f},{y_axis(_scaled(py, log_y)):.1f}" for px, py in line)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{places}"/>')
        parts.append(_label(LEFT + 130 * number, 34, name, colour))
    low, high = (f"{10**v:.0e}" if log_y else f"{v:.3g}" for v in (y_axis.low, y_axis.high))
    parts += [
        _label(4, HEIGHT - BOTTOM, low),
        _label(4, TOP + 10, high),
        _label(4, (TOP + HEIGHT - BOTTOM) / 2, y),
        _label(LEFT, HEIGHT - 22, f"{x_axis.low:g}"),
        _label(WIDTH - RIGHT, HEIGHT - 22, f"{x_axis.high:g}", anchor="end"),
        _label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x, anchor="middle"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Axis:
    """From a number to a place; an axis on which all numbers are one puts it in the middle."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self.low, self.high, self._begin, self._end = low, high, begin, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self._begin + (self._end - self._begin) * share


def _scaled(value: float, log: bool) -> float:
    return log10(max(value, FLOOR)) if log else value


def _label(x: float, y: float, text: str, colour: str = "#555", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'
