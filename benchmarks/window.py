"""The adaptive window on a real server, beside fixed ones, over the steps of a training run; and a plot of it.

`python -m benchmarks.window --url http://127.0.0.1:8000 [--rounds 7] [--chart docs/window.svg]`

Each round is one training step of every contender, in turn: a machine whose speed changes then changes for all of
them. The adaptive controller is kept from step to step; its first step, in which it finds its window, is told apart.
Only ratios within a run mean anything.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from myserve.cli.client import ServerClient
from myserve.sdk import AdaptiveConcurrencyController, DeploymentSampler, FixedConcurrencyController
from myserve.sdk.display.plotting import COLOURS, check_chart_path, drawn
from myserve.wire.perf_metrics import PerfMetrics

FIXED = (16, 64, 128, 256)


@dataclass
class Watched(AdaptiveConcurrencyController):
    """The controller, writing down (seconds, window, queue) at each answer; time runs in its own steps alone."""

    target: float
    points: list[tuple[float, int, float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # when each ended

    def __post_init__(self) -> None:
        super().__init__(initial_window=16, max_window=256, prefill_queue_target=self.target)
        self.began = 0.0

    def observe(self, metrics: PerfMetrics, *, samples: int, limit_version: int) -> None:
        super().observe(metrics, samples=samples, limit_version=limit_version)
        self.points.append((self._now(), self.window, metrics.prefill_queue_duration or 0.0))

    def begin_step(self) -> None:
        self.began = time.monotonic() - (self.steps[-1] if self.steps else 0.0)

    def end_step(self) -> None:
        self.steps.append(self._now())
        self.step_completed()
        self.points.append((self.steps[-1], self.window, self.points[-1][2]))

    def _now(self) -> float:
        return time.monotonic() - self.began


async def pace(url: str, model: str, controller: FixedConcurrencyController, samples: int) -> float:
    """Tokens a second over a step: `samples` samples of 8 to 40 tokens, each of a prompt of its own."""
    lengths = [8 + i * 7919 % 33 for i in range(samples)]
    async with DeploymentSampler(url, model, concurrency_controller=controller) as sampler:
        began = time.monotonic()
        calls = [
            sampler.sample_with_prompt_tokens(
                [1 + i % 97, 1 + i // 97, 5, 6, 7], max_tokens=length, ignore_eos=True, seed=7
            )
            for i, length in enumerate(lengths)
        ]
        await asyncio.gather(*calls)
        return sum(lengths) / (time.monotonic() - began)


def plot(watched: Watched, path: Path) -> None:
    """Write a chart of the window (left axis) and of the prefill queue (right axis) over the adaptive steps."""
    with drawn(path, height=3.9) as (left,):
        right = left.twinx()
        begin = 0.0
        for number, end in enumerate(watched.steps):  # a line for each step: nothing is queued between them
            queued = [(t, queue) for t, _, queue in watched.points if begin < t <= end]
            label = "" if number else "prefill queue of a sample"
            right.plot(*zip(*queued, strict=True), color=COLOURS[1], lw=0.8, label=label)
            left.axvline(end, color="#9ca3af", ls=":", lw=1, label="" if number else "end of a training step")
            begin = end
        right.axhline(
            watched.target, color=COLOURS[1], ls="--", lw=1, label=f"its target, {watched.target:g} s"
        )
        seconds, windows, _ = zip(*watched.points, strict=True)
        left.step(seconds, windows, where="post", color=COLOURS[0], label="window")
        left.set_title("Window and queue over the steps of a run", pad=24)
        left.set_xlabel("seconds of the run's own steps")
        left.set_ylabel("samples in flight", color=COLOURS[0])
        left.set_ylim(bottom=0)
        right.set_ylabel("seconds in the queue", color=COLOURS[1])
        right.set_ylim(bottom=0)
        right.grid(visible=False)
        lines = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        left.legend(handles=lines, loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=4)


async def run(url: str, samples: int, rounds: int, target: float, chart: Path | None) -> None:
    model = await ServerClient(url).first_model()
    await pace(url, model, FixedConcurrencyController(64), 200)  # warm up
    watched = Watched(target)
    paces: dict[str, list[float]] = {f"fixed {window}": [] for window in FIXED} | {"adaptive": []}
    contenders = list(paces)
    for turn in range(rounds + 1):
        for name in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            if name == "adaptive":
                watched.begin_step()
                value = await pace(url, model, watched, samples)
                watched.end_step()
            else:
                value = await pace(url, model, FixedConcurrencyController(int(name.split()[1])), samples)
            paces[name].append(value)
    steady = {name: values[1:] for name, values in paces.items()}
    best = max(
        (name for name in steady if name != "adaptive"), key=lambda name: statistics.median(steady[name])
    )
    for name, values in steady.items():
        # Round by round: neighbours in time share the machine's speed, medians of all rounds do not.
        ratios = [value / rival for value, rival in zip(values, steady[best], strict=True)]
        print(
            f"{name:10} {statistics.median(values):8,.0f} tokens/s   {statistics.median(ratios):.2f} of {best}"
        )
    print(f"its first step {paces['adaptive'][0]:8,.0f} tokens/s; the window ended at {watched.window}")
    if chart is not None:
        plot(watched, chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--samples", type=int, default=400, help="in a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target", type=float, default=0.5, help="seconds of prefill queue")
    parser.add_argument("--chart", type=Path, help="a file that ends with .svg, .png or .pdf")
    args = parser.parse_args()
    if args.chart is not None:
        check_chart_path(args.chart)
    asyncio.run(run(args.url, args.samples, args.rounds, args.target, args.chart))


if __name__ == "__main__":
    main()
