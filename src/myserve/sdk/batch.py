"""Samples many prompts: as they finish or in order, with a progress bar, a deadline, and a journal to resume from."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from myserve.sdk.errors import SamplingError
from myserve.sdk.options import CallPlan, Prompt, TokenIds
from myserve.sdk.records.journal import Journal, JournalError
from myserve.sdk.seeds import prompt_seed, random_seed
from myserve.sdk.transport.pool import ServerPool
from myserve.sdk.types import Completions, SampledCompletion

if TYPE_CHECKING:
    from myserve.sdk.display.progress import SampleProgress

__all__ = ["OPEN_PROMPTS", "BatchGroup", "GroupSampler", "SampleBatch"]

T = TypeVar("T")
# Prompts in work at a time: more than any window holds, and few enough that a million prompts cost no memory.
OPEN_PROMPTS = 1024


class GroupSampler(Protocol):
    """The part of a `DeploymentSampler` that a batch uses: one prompt's ids, its plan, and its samples."""

    run_seed: int | None
    backend: ServerPool

    def prompt_ids(self, prompt: Prompt) -> list[int]: ...
    def plan(self, prompt_token_ids: TokenIds, options: Mapping[str, Any]) -> CallPlan: ...
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
    """The result of `DeploymentSampler.sample_batch`. It starts when it is awaited or iterated."""

    def __init__(
        self,
        sampler: GroupSampler,
        prompts: Sequence[Prompt] | TokenIds,
        options: dict[str, Any],
        *,
        journal: str | Path | None = None,
        progress: bool = False,
        deadline: float | None = None,
    ) -> None:
        self._sampler = sampler
        self._prompts = _rows(prompts)
        self._options = options
        self._journal_path = journal
        self._progress = progress
        self._deadline = deadline
        run_seed = options.get("seed")
        run_seed = run_seed if run_seed is not None else sampler.run_seed
        self.run_seed: int = run_seed if run_seed is not None else random_seed()

    def __await__(self) -> Generator[Any, None, list[Completions]]:
        """Return all groups, in the order of the prompts."""
        return self._in_order().__await__()

    async def _in_order(self) -> list[Completions]:
        async with aclosing(self.__aiter__()) as groups:
            done = {index: completions async for index, completions in groups}
        return [done[index] for index in range(len(self._prompts))]

    async def __aiter__(self) -> AsyncGenerator[BatchGroup]:
        """Yield groups as they finish. Leaving the loop early aborts the rest."""
        with self._journal() as journal, self._bar() as bar:
            if journal is not None:
                self.run_seed = journal.run_seed
            runner = _Runner(self._sampler, journal, bar)
            until = None if self._deadline is None else asyncio.get_running_loop().time() + self._deadline
            work = (runner.draw(index, call, until) for index, call in self._plans())
            async with aclosing(_windowed(work, OPEN_PROMPTS)) as groups:
                async for group in groups:
                    yield group

    def _plans(self) -> Generator[tuple[int, CallPlan]]:
        """Yield each prompt's call. The k-th copy of a prompt has samples of its own, wherever it stands."""
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
        from myserve.sdk.display.progress import (
            SampleProgress,  # rich, which a run without a bar need not load
        )

        return SampleProgress(len(self._prompts) * self._options.get("n", 1), self._sampler.backend)


class _Runner:
    """Draw the groups of one batch; write each sample to the journal and count it on the bar."""

    def __init__(self, sampler: GroupSampler, journal: Journal | None, bar: SampleProgress | None) -> None:
        self._sampler = sampler
        self._journal = journal
        self._bar = bar

    async def draw(self, index: int, call: CallPlan, until: float | None) -> BatchGroup:
        fingerprint = call.request.fingerprint() if self._journal is not None else ""
        known = self._known(fingerprint, call)

        def on_end(end: SampledCompletion | SamplingError) -> None:
            if self._journal is not None and isinstance(end, SampledCompletion):
                self._journal.add(fingerprint, end, call.request)
            # With "refill", a failure is asked for again; it counts when it is a sample.
            is_final = isinstance(end, SampledCompletion) or call.on_error == "keep"
            if self._bar is not None and is_final:
                self._bar.advance(1)

        if self._bar is not None:
            self._bar.advance(call.n if call.is_too_long else len(known))
        call = _within(call, until)
        return BatchGroup(index, await self._sampler.draw(call, known=known, on_end=on_end))

    def _known(self, fingerprint: str, call: CallPlan) -> Mapping[int, SampledCompletion]:
        if self._journal is None:
            return {}
        known = {i: sample for i, sample in self._journal.known(fingerprint).items() if i < call.n}
        for index, sample in known.items():
            if tuple(sample.prompt_tokens) != call.request.prompt_token_ids:
                raise JournalError(
                    f"{self._journal.path}: sample {index} of {fingerprint} has another prompt: edited?"
                )
        return known


async def _windowed(work: Iterator[Coroutine[Any, Any, T]], limit: int) -> AsyncGenerator[T]:
    """Yield what each piece of work returns, as they finish, with at most `limit` of them running.

    Work is taken from its iterator as there is room. Leaving early cancels what runs.
    """
    running: set[asyncio.Task[T]] = set()
    try:
        while True:
            running |= {asyncio.create_task(piece) for piece in islice(work, limit - len(running))}
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _rows(prompts: Sequence[Prompt] | TokenIds) -> Sequence[Prompt]:
    """Return the prompts of an array [B, P] or of an encoding of several texts; a sequence as it is."""
    if isinstance(prompts, str | bytes):
        raise TypeError("prompts is one text: pass a list of them")
    if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids"):
        return _rows_of_encoding(prompts if isinstance(prompts, Mapping) else vars(prompts))
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts come in a sequence, an array or an encoding, not in {type(prompts).__name__}"
        )
    return prompts  # type: ignore[return-value]  # mypy takes a list of ids apart into single ids


def _rows_of_encoding(encoding: Mapping[str, Any]) -> Sequence[Prompt]:
    if "input_ids" not in encoding:
        raise TypeError("prompts is a mapping without input_ids: pass a list of prompts")
    columns = {name: encoding[name] for name in ("input_ids", "attention_mask") if name in encoding}
    lists = {
        name: column.tolist() if hasattr(column, "tolist") else column for name, column in columns.items()
    }
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _within(call: CallPlan, until: float | None) -> CallPlan:
    """Return the call with what is left of the batch's time, if that is less than its own."""
    if until is None:
        return call
    left = max(0.0, until - asyncio.get_running_loop().time())
    return CallPlan(call.request, call.n, call.max_seq_len, call.on_error, min(left, call.timeout or left))
