"""Twice the capacity with random aborts: nothing leaks, nothing sticks, and every answer is the one it gives alone.

    python -m benchmarks.soak [--minutes 10] [--model FOLDER] [--quantize int8] [--speculation 4] [--seed 0]
    python -m benchmarks.soak --kind qwen3_5_text   # a tiny random model of a kind of `tools.models`

The engine has room for 16 requests and blocks for about half of their contexts, so that it often preempts; 32 are
kept in flight. Ends with status 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from myserve.core.params import SamplingParams
from myserve.embedded import embedded_model_path
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from tools.models.kinds import make

IN_FLIGHT = 32
KINDS = 60  # different requests: each is answered alone once, and many times in company

Answer = list[tuple[int, float, float]]  # id, logprob, behaviour logprob


@dataclass
class Tally:
    finished: int = 0
    aborted: int = 0
    wrong: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # GiB, once a tenth of the time


def requests(rng: random.Random, vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share beginnings, and every kind of sampling."""
    stems = [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 120))] for _ in range(8)]
    made = []
    for _ in range(KINDS):
        prompt = rng.choice(stems) + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 60))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 80),
            seed=rng.getrandbits(63),
            ignore_eos=rng.random() < 0.5,
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([None, 20]),
            repetition_penalty=rng.choice([1.0, 1.1]),
        )
        made.append((prompt, params))
    return made


async def answer(
    engine: Engine, prompt: list[int], params: SamplingParams, stop_after: int | None
) -> Answer | None:
    """Return the answer; None where it was aborted after some deltas."""
    stream, got, deltas = engine.submit(prompt, params), [], 0
    async for delta in stream:
        got += [(t.token_id, t.logprob, t.sampling_logprob) for t in (*delta.tokens, *delta.stop_tokens)]
        deltas += 1
        if stop_after is not None and deltas > stop_after:
            stream.abort()
            return None
    return got


async def soak(engine: Engine, seconds: float, rng: random.Random, tally: Tally) -> None:
    asked = requests(rng, engine.vocab_size)
    alone = [await answer(engine, *request, stop_after=None) for request in asked]
    end = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            number = rng.randrange(KINDS)
            stop_after = rng.randint(0, 20) if rng.random() < 0.3 else None
            got = await asyncio.wait_for(answer(engine, *asked[number], stop_after=stop_after), 120)
            if got is None:
                tally.aborted += 1
            elif got == alone[number]:
                tally.finished += 1
            else:
                tally.wrong.append(number)

    async def watch() -> None:
        while time.monotonic() < end:
            tally.memory.append(_resident_gib())
            await asyncio.sleep(seconds / 10)

    await asyncio.gather(watch(), *(client() for _ in range(IN_FLIGHT)))


def _resident_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", default=None, help="a folder; default: the embedded model")
    parser.add_argument("--kind", default=None, help="a tiny random model of this kind, made for the run")
    parser.add_argument("--quantize", choices=("off", "int8"), default="off")
    parser.add_argument("--speculation", default="auto", help="auto, off, or drafted tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = EngineConfig(
        num_blocks=48, max_num_seqs=16, quantize=options.quantize, speculation=options.speculation
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.kind:
            make(options.kind, Path(folder))
        model = folder if options.kind else options.model or str(embedded_model_path())
        engine = Engine.from_pretrained(model, config)
    tally = Tally()
    asyncio.run(soak(engine, 60 * options.minutes, random.Random(options.seed), tally))
    engine.scheduler.check_integrity()
    pool = engine.scheduler.pool
    idle = not engine.scheduler.running and not engine.scheduler.waiting
    states = engine.scheduler.block_tables.states
    kept = 0 if states is None else states.num_slots - states.num_free
    engine.shutdown()
    print(
        f"{tally.finished} answers equal to their own alone, {len(tally.wrong)} not; {tally.aborted} aborted; "
        f"{engine.scheduler.num_preemptions} preemptions; idle {idle}; {pool!r}; {kept} states held\n"
        f"drafts: {engine.meters.drafts}\n"
        f"memory, GiB: {' '.join(f'{gib:.2f}' for gib in tally.memory)}"
    )
    sys.exit(bool(tally.wrong) or not idle or bool(kept) or not tally.finished)


if __name__ == "__main__":
    main()
