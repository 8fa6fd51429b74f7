"""A hot load every few seconds under many streams: each answer must be what the versions that it names give.

    python -m benchmarks.hot_load                 # three minutes, 32 streams, a hot load every 5 s
    python -m benchmarks.hot_load --seconds 20

A server of its own process, the SDK as its client, four snapshots of the embedded model that differ by a little noise.
Afterwards `weight_replay` computes every answer again, token for token, from its marks. As a control, answers whose
marks are moved by one token must come out as wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hot_load.server import MODES, SNAPSHOTS, make_snapshots, served
from benchmarks.hot_load.weight_replay import replay
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.loader import load
from myserve.engine.weights.prepare import prepare
from myserve.sdk import DeploymentSampler, SampledCompletion

CONTROLS = 50


@dataclass
class Run:
    """Collect the answers, failures and reports of a run."""

    answers: list[tuple[list[int], SampledCompletion]] = field(default_factory=list)
    reports: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # with the mode
    snapshot_of: dict[int, int] = field(default_factory=lambda: {0: 0})  # by version
    failures: list[str] = field(default_factory=list)


async def soak(url: str, seconds: float, streams: int, every: float) -> Run:
    run = Run()
    async with DeploymentSampler(url, "demo") as sampler:
        await sampler.sample_with_prompt_tokens([1, 2], max_tokens=4, temperature=0)  # until it is loaded
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(_stream(sampler, run, end, random.Random(number)))
            group.create_task(_update(sampler, run, end, every))
    return run


async def _stream(sampler: DeploymentSampler, run: Run, end: float, rng: random.Random) -> None:
    """Ask for one answer after the other; half of the prompts share a prefix."""
    while time.monotonic() < end:
        shared = random.Random(rng.randrange(4))
        prompt = [shared.randrange(3, 500) for _ in range(rng.choice([5, 40, 120]))] + [rng.randrange(3, 500)]
        options: dict[str, Any] = {"max_tokens": rng.randint(20, 300), "ignore_eos": True}
        try:
            (answer,) = await sampler.sample_with_prompt_tokens(prompt, logprobs=True, **options)
        except Exception as error:
            run.failures.append(str(error))
        else:
            run.answers.append((prompt, answer))


async def _update(sampler: DeploymentSampler, run: Run, end: float, every: float) -> None:
    for number, mode in zip(itertools.count(1), itertools.cycle(MODES), strict=False):
        await asyncio.sleep(every)
        if time.monotonic() > end:
            return
        (report,) = await sampler.update_weights(str(number % SNAPSHOTS), mode=mode)
        run.snapshot_of[report["weight_version"]] = number % SNAPSHOTS
        run.reports.append((mode, dict(report)))


class Judge:
    """Computes answers again."""

    def __init__(self, root: Path, run: Run) -> None:
        config = EngineConfig(num_blocks=64)
        self._engine = Engine.from_pretrained(str(root / "0"), config)
        names = load(str(root / "0"), config).weight_names
        self._ready = [
            prepare(
                root / str(n), self._engine.runner.model, names, partial=False, checksum=None, may_cast=False
            )
            for n in range(SNAPSHOTS)
        ]
        self._snapshot_of = run.snapshot_of

    def agrees(self, prompt: list[int], answer: SampledCompletion, spans: list[dict[str, int]]) -> bool:
        def install(version: int) -> None:
            self._ready[self._snapshot_of[version]].install()

        params = SamplingParams(seed=answer.seed)
        numbers = replay(self._engine, install, prompt, answer.completion_tokens, spans, params, answer.index)
        assert answer.inference_logprobs is not None and answer.sampling_logprobs is not None
        given = zip(
            answer.completion_tokens, answer.inference_logprobs, answer.sampling_logprobs, strict=True
        )
        return numbers == list(given)


def spans_of(answer: SampledCompletion) -> list[dict[str, int]]:
    whole = {"start": 0, "end": answer.completion_len, "weight_version": answer.weight_version or 0}
    return answer.weight_version_spans or [whole]


def can_be_moved(spans: list[dict[str, int]]) -> bool:
    return len(spans) > 1 and spans[1]["end"] - spans[1]["start"] > 1


def moved(spans: list[dict[str, int]]) -> list[dict[str, int]]:
    """Return the spans with the first border one token later."""
    first, second, *rest = ({**span} for span in spans)
    first["end"] = second["start"] = first["end"] + 1
    return [first, second, *rest]


def report(run: Run, judge: Judge, seconds: float) -> bool:
    wrong = sum(not judge.agrees(prompt, answer, spans_of(answer)) for prompt, answer in run.answers)
    spanning = [(prompt, answer) for prompt, answer in run.answers if can_be_moved(spans_of(answer))]
    controls = spanning[:CONTROLS]
    caught = sum(not judge.agrees(prompt, answer, moved(spans_of(answer))) for prompt, answer in controls)
    tokens = sum(answer.completion_len for _, answer in run.answers)
    pause = 1000 * max((one["pause_duration"] for _, one in run.reports), default=0.0)
    preparing = max((one["prepare_duration"] for _, one in run.reports), default=0.0)
    drained = [one["drain_duration"] for mode, one in run.reports if mode == "drain"]
    aborted = sum(answer.finish_reason == "abort" for _, answer in run.answers)
    print(f"{seconds:.0f} s: {len(run.answers)} answers, {tokens} tokens, {len(run.failures)} failures")
    print(f"{len(run.reports)} hot loads: {dict(Counter(mode for mode, _ in run.reports))}")
    print(f"pause: longest {pause:.2f} ms; preparing: longest {preparing:.2f} s, the old weights serving")
    print(f"drains: longest {max(drained, default=0.0):.2f} s; aborted answers: {aborted}")
    print(
        f"answers of several versions: {len(spanning)}; computed again from their marks and differing: {wrong}"
    )
    print(f"control: of {len(controls)} answers with a mark moved by one token, {caught} come out as wrong")
    for failure in run.failures[:3]:
        print("failure:", failure)
    return not wrong and not run.failures and caught == len(controls)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two hot loads")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_snapshots(root)
        with served(root) as url:
            run = asyncio.run(soak(url, options.seconds, options.streams, options.every))
        if not report(run, Judge(root, run), options.seconds):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
