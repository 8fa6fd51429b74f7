"""The texts that are asked for, and how: copying and free, alone and many at once, siblings, a second epoch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.speculation.texts import COPYING, FREE

RANDOM_IDS = range(1000, 150_000)


@dataclass(frozen=True)
class Workload:
    """Requests that run side by side, several times with other seeds."""

    prompts: Sequence[str | list[int]]
    temperature: float
    streams: int = 1  # requests at once
    n: int = 1
    epochs: int = 1  # the last is measured; the others come before it, under the same salt

    @property
    def is_plain(self) -> bool:
        """Return whether any server can be asked so: texts, one choice, one epoch."""
        return self.n == self.epochs == 1 and all(isinstance(prompt, str) for prompt in self.prompts)


def workloads() -> Mapping[str, Workload]:
    copying, free = list(COPYING.values()), list(FREE.values())
    rng = random.Random(0)
    ids: list[str | list[int]] = [rng.choices(RANDOM_IDS, k=64) for _ in range(3)]
    return {
        "copying-0": Workload(copying, 0.0),
        "copying-0.7": Workload(copying, 0.7),
        "free-0": Workload(free, 0.0),
        "free-0.7": Workload(free, 0.7),
        "8-streams": Workload(copying * 2, 0.0, streams=8),
        "8-siblings": Workload(copying[:2] + free[:2], 0.7, n=8),
        "epoch2": Workload(copying[:2] + free[:2], 1.0, n=4, epochs=2),
        "random": Workload(ids, 1.0),
    }
