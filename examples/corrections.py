"""The corrections of truncated sampling beside each other: the loop of grpo.py at a low top-p, on some seeds.

python examples/corrections.py --top-p 0.7 --steps 40 --seeds 3     # a table, and runs/corrections/rewards.svg
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import get_args

from grpo import Config, Correction, train
from support.serving import Server

from myserve.embedded import embedded_model_path
from myserve.sdk.display.plotting import line_plot

LAST = 5  # steps whose rewards count as the end

Row = dict[str, float]


def ended(rows: list[Row]) -> Row:
    """Return a run's last figures; `reward` is of answers drawn with top-p."""
    rewards = [row["reward"] for row in rows if "reward" in row]
    return {
        "reward": fmean(rewards[-LAST:]),
        "sampled": rows[-1]["sampled"],
        "greedy": rows[-1]["greedy"],
        "mismatch": max(row.get("mismatch", 0.0) for row in rows),
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in per cent."""
    around = f" ± {stdev(values):.1%}" if len(values) > 1 else ""
    return f"{fmean(values):.1%}{around}"


def line(correction: str, runs: list[list[Row]]) -> str:
    ends = [ended(rows) for rows in runs]
    shares = [spread([end[name] for end in ends]) for name in ("reward", "sampled", "greedy")]
    return f"| `{correction}` | {' | '.join(shares)} | {max(end['mismatch'] for end in ends):.2g} |"


def plot(found: dict[str, list[list[Row]]], top_p: float, path: Path) -> None:
    """Write a chart of the rewards, a mean over the seeds."""
    series = {
        correction: [
            (step, fmean(rows[int(step)]["reward"] for rows in runs))
            for step in [r["step"] for r in runs[0][:-1]]
        ]
        for correction, runs in found.items()
    }
    line_plot(path, series, title=f"Drawn with top-p {top_p}", x="training step", y="mean reward")


async def main(
    top_p: float = 0.7,
    steps: int = 40,
    seeds: int = 3,
    prompts: int = 64,
    exam: int = 812,
    run: str = "runs/corrections",
) -> dict[str, list[list[Row]]]:
    """Return each correction's curves, one a seed. All runs are on one server."""
    weights = Path(run) / "weights"
    found: dict[str, list[list[Row]]] = {correction: [] for correction in get_args(Correction)}
    with Server(str(embedded_model_path()), weights) as server:
        for seed in range(7, 7 + seeds):
            for correction in found:
                config = Config(
                    run=f"{run}/{correction}-{seed}", url=server.url, weights_dir=str(weights), steps=steps, seed=seed,
                    prompts=prompts, top_p=top_p, correction=correction, exam=exam, exam_every=steps,
                )  # fmt: skip
                folder = await train(config)
                rows = [json.loads(row) for row in (folder / "curve.jsonl").read_text().splitlines()]
                found[correction].append(rows)
    plot(found, top_p, Path(run) / "rewards.svg")
    print(f"| correction | reward, last {LAST} steps | held out, T=1 | held out, greedy | mismatch |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(line(correction, runs) for correction, runs in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top-p", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--run", default="runs/corrections")
    asyncio.run(main(**vars(parser.parse_args())))
