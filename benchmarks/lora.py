"""Measures adapters: 32 streams that share 8 of them, beside 32 without any, in turns, in one process.

    python -m benchmarks.lora                          # the benchmarks' own model, 8 adapters of rank 16
    python -m benchmarks.lora --adapters 1 --rank 64 --streams 8

Every linear layer but the output layer is changed. A figure is the median over rounds of the median over streams of
seconds a token behind the first; the ratio is what adapters cost.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.adapters import write_adapter
from benchmarks.idle import wait_until_idle
from benchmarks.model import VOCAB_SIZE, model_folder
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions

PROMPT = 32


async def round_of(engine: Engine, names: list[str | None], tokens: int, seed: int) -> float:
    """Return seconds a token of one round, a stream for each name."""
    rng = random.Random(seed)
    params = SamplingParams(max_tokens=tokens, seed=1, temperature=0.0, ignore_eos=True)

    async def one(name: str | None) -> float:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(PROMPT)]
        duration = 0.0
        async for delta in engine.submit(prompt, params, SubmitOptions(adapter=name)):
            if delta.metrics is not None:
                duration = delta.metrics.generation_duration
        return duration / (tokens - 1)

    return median(await asyncio.gather(*(one(name) for name in names)))


def main(
    model: Annotated[
        Path | None, typer.Argument(help="A model's folder; by default the benchmarks' own.")
    ] = None,
    streams: int = 32,
    adapters: int = 8,
    rank: int = 16,
    tokens: int = 24,
    rounds: int = 5,
    quantize: str = "off",
) -> None:
    """Measure `rounds` rounds of each, in turns."""
    folder = model or model_folder()
    config: Any = {
        "speculation": "off",
        "kv_cache_bytes": 1 << 29,
        "max_model_len": 2048,
        "quantize": quantize,
    }
    engine = Engine.from_pretrained(str(folder), EngineConfig(**config))
    names = [f"adapter-{i}" for i in range(adapters)]
    with tempfile.TemporaryDirectory() as root:
        for seed, name in enumerate(names):
            path = write_adapter(Path(root) / name, folder, seed=seed, rank=rank, size=0.02)
            loaded = engine.load_adapter(name, path).result()
            print(f"{name}: {loaded.num_bytes / 1e6:.1f} MB in memory")
    wanted: dict[str, list[str | None]] = {
        "none": [None] * streams,
        "mixed": [names[i % adapters] for i in range(streams)],
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in wanted}
    for number in range(rounds + 1):  # the first records the steps
        wait_until_idle()
        for kind, each in wanted.items():
            taken = asyncio.run(round_of(engine, each, tokens, number))
            if number:
                seconds[kind].append(taken)
                print(f"{kind}: {1e3 * taken:.1f} ms a step")
    none, mixed = median(seconds["none"]), median(seconds["mixed"])
    print(
        f"{streams} streams, {adapters} adapters of rank {rank}: {1e3 * mixed:.1f} ms a step, without {1e3 * none:.1f}"
    )
    print(f"ratio {mixed / none:.3f}")
    engine.shutdown()


if __name__ == "__main__":
    typer.run(main)
