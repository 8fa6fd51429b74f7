"""Measures one server: finds out what it understands, warms it up, runs each workload several times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from myserve.bench.figures import Figures, median_of
from myserve.bench.load import BenchError, ServerFeatures, Target
from myserve.bench.workload import Prompt, Workload, id_prompts, text_prompts

__all__ = ["Session"]


@dataclass(slots=True)
class Session:
    """Measure workloads on `target`. `ids`: what prompts are drawn from; empty for a server that takes text alone.

    `seed` makes the prompts and, when `seeds_draws`, goes with the requests: some servers (vLLM) draw slower then.
    """

    target: Target
    ids: Sequence[int]
    seed: int = 0
    seeds_draws: bool = False
    on_read: Callable[[bytes], None] = lambda data: None
    _drawn: int = field(default=0, init=False)

    @classmethod
    async def open(
        cls, target: Target, *, vocab_size: int | None = None, seed: int = 0, seeds_draws: bool = False
    ) -> Session:
        """Return a session with prompts of any ids below `vocab_size`; if None, of the ids that /tokenize gives."""
        if vocab_size is not None:
            return cls(target, range(vocab_size), seed, seeds_draws)
        ids = await target.tokenize(" ".join(text_prompts(Workload(1, 200, 1), seed)))
        return cls(target, sorted(set(ids or ())), seed, seeds_draws)

    async def measure(
        self, workload: Workload, repeats: int
    ) -> tuple[Figures, list[Figures], ServerFeatures]:
        """Return the medians of `repeats` runs, the runs, and the features that were used. Raises BenchError."""
        dialect = await self.dialect(workload)
        await self.target.run(workload.warm_up(), self.prompts(workload.warm_up(), dialect), dialect)
        runs = [await self.run(workload, dialect) for _ in range(repeats)]
        return median_of(runs), runs, dialect

    async def run(self, workload: Workload, dialect: ServerFeatures) -> Figures:
        """Return the figures of one run. Raises BenchError."""
        prompts = self.prompts(workload, dialect)
        seed = self.seed if self.seeds_draws else None
        return await self.target.run(workload, prompts, dialect, self.on_read, seed)

    async def dialect(self, workload: Workload) -> ServerFeatures:
        """Return the richest features that the server accepts for such a workload. Raises BenchError for none."""
        probe = Workload(1, 4, 1, workload.sampling, workload.n)
        refusals: list[str] = []
        for dialect in ServerFeatures.candidates(ids=bool(self.ids)):
            refused = await self.target.accepts(probe, self.prompts(probe, dialect)[0], dialect)
            if refused is None:
                return dialect
            refusals.append(refused)
        raise BenchError(f"{self.target.url} refused {workload}: {refusals[0]}")

    def prompts(self, workload: Workload, dialect: ServerFeatures) -> list[Prompt]:
        """Return prompts, new ones at every call."""
        self._drawn += 1
        seed = self.seed * 1_000_003 + self._drawn
        if dialect.takes_ids:
            return [*id_prompts(workload, self.ids, seed)]
        return [*text_prompts(workload, seed)]
