"""The adaptive window on a real server: its throughput beside fixed windows, and a plot of window and queue.

`python -m benchmarks.window --url http://127.0.0.1:8000 [--samples 600] [--svg docs/window.svg]`
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

from myserve.cli.client import ServerClient
from myserve.sdk import AdaptiveConcurrencyController, DeploymentSampler, FixedConcurrencyController
from myserve.wire.perf_metrics import PerfMetrics

FIXED = (16, 64, 128)
WIDTH, HEIGHT, EDGE = 720, 260, 40


@dataclass
class Watched(AdaptiveConcurrencyController):
    """The controller, writing down (seconds, window, queue) at each answer."""

    target: float
    points: list[tuple[float, int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(initial_window=16, max_window=256, prefill_queue_target=self.target)
        self.began = time.monotonic()

    def observe(self, metrics: PerfMetrics, *, samples: int, epoch: int) -> None:
        super().observe(metrics, samples=samples, epoch=epoch)
        now = time.monotonic() - self.began
        self.points.append((now, self.window, metrics.prefill_queue_duration or 0.0))


async def pace(url: str, model: str, controller: FixedConcurrencyController, samples: int) -> float:
    """Tokens a second over the second half of `samples` samples of 24 tokens, each of a prompt of its own."""
    half, done, began = samples // 2, 0, 0.0
    async with DeploymentSampler(url, model, concurrency_controller=controller) as sampler:
        prompts = [[1 + i % 97, 1 + i // 97, 5, 6, 7] for i in range(samples)]
        async for _ in sampler.sample_batch(prompts, max_tokens=24, ignore_eos=True, seed=7):
            done += 1
            began = time.monotonic() if done == half else began
        return 24 * (samples - half) / (time.monotonic() - began)


def plot(points: list[tuple[float, int, float]], target: float) -> str:
    """An SVG with two curves, each on its own scale: window (left), queue in seconds (right)."""
    seconds = points[-1][0]
    highest = max(window for _, window, _ in points)
    longest = max(target * 1.5, *(queue for *_, queue in points))

    def curve(values: list[tuple[float, float]], top: float, colour: str) -> str:
        inner_width, inner_height = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE
        places = (
            f"{EDGE + inner_width * t / seconds:.1f},{HEIGHT - EDGE - inner_height * v / top:.1f}"
            for t, v in values
        )
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(places)}"/>'

    def label(x: float, y: float, text: str, colour: str = "#555") -> str:
        return f'<text x="{x}" y="{y}" fill="{colour}" font-family="sans-serif" font-size="12">{text}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        curve([(0.0, target), (seconds, target)], longest, "#ddd"),
        curve([(t, queue) for t, _, queue in points], longest, "#d08770"),
        curve([(t, float(window)) for t, window, _ in points], float(highest), "#2e5e8c"),
        label(EDGE, 20, f"window, up to {highest} samples in flight", "#2e5e8c"),
        label(
            WIDTH / 2, 20, f"prefill queue, up to {longest:.2f} s (grey: the target, {target:g} s)", "#d08770"
        ),
        label(EDGE, HEIGHT - 12, "0 s"),
        label(WIDTH - EDGE - 20, HEIGHT - 12, f"{seconds:.0f} s"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


async def run(url: str, samples: int, target: float, svg: Path | None) -> None:
    model = await ServerClient(url).first_model()
    await pace(url, model, FixedConcurrencyController(16), 32)  # warm up
    paces = {f"fixed {k}": await pace(url, model, FixedConcurrencyController(k), samples) for k in FIXED}
    watched = Watched(target)
    paces["adaptive"] = await pace(url, model, watched, samples)
    best = max(value for name, value in paces.items() if name != "adaptive")
    for name, value in paces.items():
        print(f"{name:10} {value:8,.0f} tokens/s   {value / best:.2f} of the best fixed window")
    print(f"the window ended at {watched.window}")
    if svg is not None:
        svg.write_text(plot(watched.points, target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--target", type=float, default=0.5, help="seconds of prefill queue")
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    asyncio.run(run(args.url, args.samples, args.target, args.svg))


if __name__ == "__main__":
    main()
