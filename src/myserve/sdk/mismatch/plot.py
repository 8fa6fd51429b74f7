"""Draws a mismatch by place in the completion. Needs matplotlib: `pip install myserve[plot]`."""

from __future__ import annotations

from pathlib import Path

from myserve.sdk.display.plotting import COLOURS, drawn
from myserve.sdk.mismatch.measure import Mismatch

__all__ = ["plot_mismatch"]

# Below this a logarithmic axis shows zero: the last bit of a float32 logprob is larger.
_ZERO = 1e-9


def plot_mismatch(found: Mismatch, path: str | Path) -> None:
    """Write a chart of |trainer - sampler| by token of the completion to `path` (.svg, .png or .pdf).

    Median, 99th percentile and maximum, on a logarithmic scale; the title is the verdict. An exact zero is drawn at
    the floor. Raises `PlottingError` without matplotlib, or for another ending.
    """
    places = list(found.by_position)
    with drawn(path) as (axes,):
        for name, title, colour in zip(
            ("max", "p99", "median"), ("largest", "99th percentile", "median"), COLOURS, strict=False
        ):
            sizes = [max(getattr(found.by_position[place], name), _ZERO) for place in places]
            axes.plot(range(len(places)), sizes, label=title, color=colour, marker="o", ms=4)
        axes.set(title=found.verdict.title, xlabel="token of the completion", yscale="log")
        axes.set_ylabel("|trainer − sampler|, nats")
        axes.set_xticks(range(len(places)), [_octave(place) for place in places])
        axes.legend(loc="best")


def _octave(place: int) -> str:
    """Name the tokens that a point stands for: by octaves, so 4 stands for 4 to 7."""
    last = max(0, 2 * place - 1)
    return f"{place}" if last <= place else f"{place}–{last}"
