"""An engine whose steps a test takes by hand, so that new weights come exactly where it wants them, and their judge."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hot_load.weight_replay import Numbers, replay
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.weights.loader import load
from myserve.engine.weights.prepare import Prepared, prepare
from myserve.engine.weights.queue import WeightUpdate
from myserve.server.answers.answer import weight_version_spans
from runs import Completion, collect

__all__ = ["Judge", "Stepped", "versions"]


class Judge:
    """The numbers that a completion must have by its marks; version v is snapshot v."""

    def __init__(self, snapshots: list[Path]) -> None:
        config = EngineConfig(num_blocks=32)
        self._engine = Engine.from_pretrained(snapshots[0], config)
        names = load(snapshots[0], config).weight_names
        self._ready: list[Prepared] = [
            prepare(path, self._engine.runner.model, names, partial=False, checksum=None, may_cast=False)
            for path in snapshots
        ]

    def __call__(
        self, prompt: list[int], done: Completion, routed: list[bytes | None] | None = None
    ) -> list[Numbers]:
        """`routed` takes the experts of the rows that tokens are drawn from."""
        spans = weight_version_spans(done.tokens)
        params = SamplingParams(seed=done.seed)
        install = lambda version: self._ready[version].install()  # noqa: E731
        return replay(self._engine, install, prompt, done.ids, spans, params, routed=routed)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.shutdown()


class Stepped:
    """An engine whose thread is the test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.engine = Engine.from_pretrained(str(folder), EngineConfig(**({"num_blocks": 32} | config)))
        monkeypatch.setattr(self.engine, "start", lambda: None)
        self.running: list[asyncio.Future[list[Completion]]] = []

    def submit(
        self,
        prompt: list[int],
        seed: int,
        max_tokens: int = 12,
        n: int = 1,
        adapter: str | None = None,
        **params: Any,
    ) -> None:
        asked = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **params)
        options = SubmitOptions(n=n, adapter=adapter)
        self.running.append(asyncio.ensure_future(collect(self.engine.submit(prompt, asked, options))))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.thread._take_inbox()
            self.engine.thread.updates.advance(self.engine.thread)
            self.engine.thread.step()
            self.engine.scheduler.check_integrity()

    def ready(self, source: Path, **options: Any) -> WeightUpdate:
        """An update that is swapped in by the next step, or drains from there on."""
        waiting = len(self.engine.thread._inbox)
        update = self.engine.update_weights(source, **options)
        while len(self.engine.thread._inbox) == waiting and update.stage != "failed":
            time.sleep(0.001)
        return update

    async def finish(self) -> list[Completion]:
        while not all(future.done() for future in self.running):
            self.step()
            await asyncio.sleep(0)
        return [choice for future in self.running for choice in future.result()]


def versions(done: Completion) -> list[int]:
    return [token.weight_version for token in done.tokens]
