"""The sampler for code that is not async: one background event loop a process, so notebooks work too."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack

from myserve.sdk.batch import SampleBatch
from myserve.sdk.concurrency.fork import reset_after_fork
from myserve.sdk.options import Messages, Prompt, SampleOptions, TokenIds
from myserve.sdk.sampling.decisions import Decisions
from myserve.sdk.types import Completions, SampledCompletion

if TYPE_CHECKING:
    from myserve.wire.weights import Replica, WeightsReport

__all__ = ["AsyncCalls", "SyncSampler", "run_sync"]

T = TypeVar("T")


class _BackgroundLoop:
    """An event loop on a thread of its own, started at the first use; a forked child starts its own."""

    def __init__(self) -> None:
        self._after_fork()
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="myserve-sdk", daemon=True).start()
            return self._loop


_background_loop = _BackgroundLoop()


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on the background loop, and return or raise what it does; an interrupt cancels it.

    >>> async def answer() -> int:
    ...     return 42
    >>> run_sync(answer())
    42
    """
    future = asyncio.run_coroutine_threadsafe(work, _background_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class AsyncCalls(Protocol):
    """The calls of `DeploymentSampler` that `SyncSampler` makes."""

    async def sample_with_tokens(self, messages: Messages, n: int = 1, **options: Any) -> Completions: ...
    async def sample_with_prompt_tokens(
        self, prompt_token_ids: TokenIds, **options: Unpack[SampleOptions]
    ) -> Completions: ...
    def stream_completions(
        self, prompt: Prompt, **options: Unpack[SampleOptions]
    ) -> AsyncGenerator[SampledCompletion]: ...
    async def decide(
        self,
        state: str | Sequence[Mapping[str, Any]],
        questions: Sequence[Mapping[str, Any]],
        **options: Any,
    ) -> Decisions: ...
    async def aclose(self) -> None: ...
    @property
    def sample_batch(self) -> Callable[..., SampleBatch]: ...
    @property
    def update_weights(self) -> Callable[..., Awaitable[list[WeightsReport]]]: ...
    @property
    def hot_load(self) -> Callable[..., Awaitable[list[Replica]]]: ...


class SyncSampler:
    """`sampler.sync`: the calls of `DeploymentSampler`, without `await`."""

    def __init__(self, sampler: AsyncCalls) -> None:
        self._sampler = sampler

    def sample_with_tokens(self, messages: Messages, n: int = 1, **options: Any) -> Completions:
        """Return n completions of a chat."""
        return run_sync(self._sampler.sample_with_tokens(messages, n, **options))

    def sample_with_prompt_tokens(
        self, prompt_token_ids: TokenIds, **options: Unpack[SampleOptions]
    ) -> Completions:
        """Return n completions of token ids."""
        return run_sync(self._sampler.sample_with_prompt_tokens(prompt_token_ids, **options))

    def stream_completions(
        self, prompt: Prompt, **options: Unpack[SampleOptions]
    ) -> Iterator[SampledCompletion]:
        """Yield whole samples as they finish."""
        stream = self._sampler.stream_completions(prompt, **options)
        try:
            while (completion := run_sync(anext(stream, None))) is not None:
                yield completion
        finally:
            run_sync(stream.aclose())

    def sample_batch(self, prompts: Sequence[Prompt] | TokenIds, **options: Any) -> list[Completions]:
        """Return n completions of each of many prompts, in their order."""

        async def run() -> list[Completions]:
            return await self._sampler.sample_batch(prompts, **options)

        return run_sync(run())

    def decide(
        self,
        state: str | Sequence[Mapping[str, Any]],
        questions: Sequence[Mapping[str, Any]],
        **options: Any,
    ) -> Decisions:
        """Return the answers to questions about a state."""
        return run_sync(self._sampler.decide(state, questions, **options))

    def update_weights(self, path: str | os.PathLike[str], **options: Any) -> list[WeightsReport]:
        """Load weights from a folder in each server's weights directory."""
        return run_sync(_awaited(self._sampler.update_weights(path, **options)))

    def hot_load(self, identity: str, **options: Any) -> list[Replica]:
        """Load weights by Fireworks' protocol."""
        return run_sync(_awaited(self._sampler.hot_load(identity, **options)))

    def close(self) -> None:
        """Close the background loop's connections."""
        run_sync(self._sampler.aclose())


async def _awaited(work: Awaitable[T]) -> T:
    return await work
