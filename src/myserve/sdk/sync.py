"""The sampler for code that is not async: one background loop for the process, so notebooks work too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack

from myserve.sdk.batch import SampleBatch
from myserve.sdk.options import Messages, Prompt, SampleOptions
from myserve.sdk.types import Completions, SampledCompletion

if TYPE_CHECKING:
    from myserve.wire.weights import Replica, WeightsReport

T = TypeVar("T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end on the background loop; an interrupt cancels it.

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


def _background_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="myserve-sdk", daemon=True).start()
        return _loop


class AsyncCalls(Protocol):
    """The calls of `DeploymentSampler` that `SyncSampler` waits for."""

    async def sample_with_tokens(self, messages: Messages, n: int = 1, **options: Any) -> Completions: ...
    async def sample_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], **options: Unpack[SampleOptions]
    ) -> Completions: ...
    def stream_completions(
        self, prompt: Prompt, **options: Unpack[SampleOptions]
    ) -> AsyncGenerator[SampledCompletion]: ...
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
        return run_sync(self._sampler.sample_with_tokens(messages, n, **options))

    def sample_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], **options: Unpack[SampleOptions]
    ) -> Completions:
        return run_sync(self._sampler.sample_with_prompt_tokens(prompt_token_ids, **options))

    def stream_completions(
        self, prompt: Prompt, **options: Unpack[SampleOptions]
    ) -> Iterator[SampledCompletion]:
        """Whole samples as they finish."""
        stream = self._sampler.stream_completions(prompt, **options)
        try:
            while (completion := run_sync(anext(stream, None))) is not None:
                yield completion
        finally:
            run_sync(stream.aclose())

    def sample_batch(self, prompts: Sequence[Prompt], **options: Any) -> list[Completions]:
        async def run() -> list[Completions]:
            return await self._sampler.sample_batch(prompts, **options)

        return run_sync(run())

    def update_weights(self, path: str, **options: Any) -> list[WeightsReport]:
        return run_sync(_awaited(self._sampler.update_weights(path, **options)))

    def hot_load(self, identity: str, **options: Any) -> list[Replica]:
        return run_sync(_awaited(self._sampler.hot_load(identity, **options)))

    def close(self) -> None:
        """Closes the background loop's connections."""
        run_sync(self._sampler.aclose())


async def _awaited(work: Awaitable[T]) -> T:
    return await work
