"""Held-out sums of several runs in one picture.

python examples/compare_curves.py runs/grpo runs/grpo-async --chart docs/async.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from myserve.sdk.display.plotting import line_plot


def points(run: Path) -> list[tuple[float, float]]:
    """Return (step, share of held-out sums right at temperature 1), where it was measured."""
    rows = [json.loads(row) for row in (run / "curve.jsonl").read_text().splitlines()]
    return [(row["step"], row["sampled"]) for row in rows if "sampled" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--chart", type=Path, required=True, help="a file that ends with .svg, .png or .pdf")
    asked = parser.parse_args()
    line_plot(
        asked.chart,
        {run.name: points(run) for run in asked.runs},
        title="Held-out sums right at temperature 1",
        x="training step",
        y="answers that are right",
        percent=True,
    )
