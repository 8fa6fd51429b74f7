"""Many prompts: as they finish or in order, with a progress bar, a deadline, and a journal to go on from."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from myserve.sdk.errors import SamplingError
from myserve.sdk.options import CallPlan, Prompt
from myserve.sdk.records.journal import Journal
from myserve.sdk.seeds import prompt_seed, random_seed
from myserve.sdk.transport.pool import ServerPool
from myserve.sdk.types import Completions, SampledCompletion

if TYPE_CHECKING:
    from myserve.sdk.progress import SampleProgress

# Prompts in work at a time: more than any window holds, and few enough that a million prompts cost no memory.
OPEN_PROMPTS = 1024


class GroupSampler(Protocol):
    """What a batch needs of a sampler: one prompt's ids, its plan, and its samples."""

    run_seed: int | None
    backend: ServerPool

    def prompt_ids(self, prompt: Prompt) -> list[int]: ...
    def plan(self, prompt_token_ids: Sequence[int], options: Mapping[str, Any]) -> CallPlan: ...
    async def draw(
        self,
        call: CallPlan,
        *,
        known: Mapping[int, SampledCompletion] | None = None,
        on_end: Callable[[SampledCompletion | SamplingError], None] | None = None,
    ) -> Completions: ...


class BatchGroup(NamedTuple):
    """The samples of one prompt of a batch."""

    prompt_index: int
    completions: Completions


class SampleBatch:
    """What `DeploymentSampler.sample_batch` returns. It starts when it is awaited or iterated."""

    def __init__(
        self,
        sampler: GroupSampler,
        prompts: Sequence[Prompt],
        options: dict[str, Any],
        *,
        journal: str | Path | None = None,
        progress: bool = False,
        deadline: float | None = None,
    ) -> None:
        self._sampler = sampler
        self._prompts = prompts
        self._options = options
        self._journal_path = journal
        self._progress = progress
        self._deadline = deadline
        run_seed = options.get("seed")
        run_seed = run_seed if run_seed is not None else sampler.run_seed
        self.run_seed: int = run_seed if run_seed is not None else random_seed()

    def __await__(self) -> Generator[Any, None, list[Completions]]:
        """All groups, in the order of the prompts."""
        return self._in_order().__await__()

    async def _in_order(self) -> list[Completions]:
        async with aclosing(self.__aiter__()) as groups:
            done = {index: completions async for index, completions in groups}
        return [done[index] for index in range(len(self._prompts))]

    async def __aiter__(self) -> AsyncGenerator[BatchGroup]:
        """Groups as they finish. Leaving the loop early aborts the rest."""
        with self._journal() as journal, self._bar() as bar:
            if journal is not None:
                self.run_seed = journal.run_seed
            runner = _Runner(self._sampler, journal, bar)
            until = None if self._deadline is None else asyncio.get_running_loop().time() + self._deadline
            plans = self._plans()
            open_tasks: set[asyncio.Task[BatchGroup]] = set()
            try:
                while True:
                    for index, call in plans:
                        open_tasks.add(asyncio.create_task(runner.draw(index, call, until)))
                        if len(open_tasks) >= OPEN_PROMPTS:
                            break
                    if not open_tasks:
                        return
                    done, open_tasks = await asyncio.wait(open_tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            finally:
                for task in open_tasks:
                    task.cancel()
                await asyncio.gather(*open_tasks, return_exceptions=True)

    def _plans(self) -> Generator[tuple[int, CallPlan]]:
        """Each prompt's call. The k-th copy of a prompt has samples of its own, wherever it stands."""
        seen: Counter[int] = Counter()
        for index, prompt in enumerate(self._prompts):
            ids = self._sampler.prompt_ids(prompt)
            key = prompt_seed(self.run_seed, ids, 0)
            seed = prompt_seed(self.run_seed, ids, seen[key])
            seen[key] += 1
            yield index, self._sampler.plan(ids, {**self._options, "seed": seed})

    def _journal(self) -> AbstractContextManager[Journal | None]:
        return nullcontext() if self._journal_path is None else Journal(self._journal_path, self.run_seed)

    def _bar(self) -> AbstractContextManager[SampleProgress | None]:
        if not self._progress:
            return nullcontext()
        from myserve.sdk.progress import SampleProgress  # rich, which a run without a bar need not load

        return SampleProgress(len(self._prompts) * self._options.get("n", 1), self._sampler.backend)


class _Runner:
    """Draws the groups of one batch, and tells the journal and the bar."""

    def __init__(self, sampler: GroupSampler, journal: Journal | None, bar: SampleProgress | None) -> None:
        self._sampler = sampler
        self._journal = journal
        self._bar = bar

    async def draw(self, index: int, call: CallPlan, until: float | None) -> BatchGroup:
        fingerprint = call.request.fingerprint() if self._journal is not None else ""
        known = self._known(fingerprint, call.n)

        def on_end(end: SampledCompletion | SamplingError) -> None:
            if self._journal is not None and isinstance(end, SampledCompletion):
                self._journal.add(fingerprint, end)
            # With "refill", a failure is asked for again; it counts when it is a sample.
            is_final = isinstance(end, SampledCompletion) or call.on_error == "keep"
            if self._bar is not None and is_final:
                self._bar.advance(1)

        if self._bar is not None:
            self._bar.advance(call.n if call.is_too_long else len(known))
        call = _within(call, until)
        return BatchGroup(index, await self._sampler.draw(call, known=known, on_end=on_end))

    def _known(self, fingerprint: str, n: int) -> Mapping[int, SampledCompletion]:
        if self._journal is None:
            return {}
        return {index: sample for index, sample in self._journal.known(fingerprint).items() if index < n}


def _within(call: CallPlan, until: float | None) -> CallPlan:
    """The call with what is left of the batch's time, if that is less than its own."""
    if until is None:
        return call
    left = max(0.0, until - asyncio.get_running_loop().time())
    return CallPlan(call.request, call.n, call.max_seq_len, call.on_error, min(left, call.timeout or left))
