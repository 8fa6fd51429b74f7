"""Held-out sums of several runs in one picture.

python examples/compare_curves.py runs/grpo runs/grpo-async --svg docs/async.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from myserve.sdk.svg import line_chart


def points(run: Path) -> list[tuple[float, float]]:
    """(step, share of held-out sums right at temperature 1), where it was measured."""
    rows = [json.loads(row) for row in (run / "curve.jsonl").read_text().splitlines()]
    return [(row["step"], row["sampled"]) for row in rows if "sampled" in row]


def chart(runs: Mapping[str, Path]) -> str:
    series = {name: points(run) for name, run in runs.items()}
    return line_chart(series, title="Held-out sums right at temperature 1", x="step", y="share right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--svg", type=Path, required=True)
    asked = parser.parse_args()
    asked.svg.write_text(chart({run.name: run for run in asked.runs}))
