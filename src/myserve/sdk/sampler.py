"""`DeploymentSampler`: prompts are tokenized here, sampled there, and come back as checked completions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, Unpack

from myserve.sdk import weights
from myserve.sdk.batch import SampleBatch
from myserve.sdk.concurrency.controllers import FixedConcurrencyController
from myserve.sdk.errors import SamplingError
from myserve.sdk.options import CallPlan, Messages, Prompt, SampleOptions, plan
from myserve.sdk.request import DEFAULT_MAX_TOKENS, as_token_ids
from myserve.sdk.retry import RetryPolicy
from myserve.sdk.sampling.group import Group
from myserve.sdk.seeds import prompt_seed, random_seed
from myserve.sdk.sync import SyncSampler
from myserve.sdk.transport.deployments import Deployment
from myserve.sdk.transport.dialects import DIALECTS, DialectName
from myserve.sdk.transport.http import AiohttpTransport, Transport
from myserve.sdk.transport.pool import ServerPool
from myserve.sdk.types import Completions, SampledCompletion, SampleDelta, SamplerStats

if TYPE_CHECKING:
    # pydantic: not imported for a sample's sake
    from myserve.wire.weights import Mode, Replica, WeightsReport

T = TypeVar("T")


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer; any object with these two will do."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


class DeploymentSampler:
    """Samples from one or several deployments of a model.

    Every option of a call is in `SampleOptions`. Safe to share between tasks, event loops and threads; needs
    no closing (its connections close with their event loop), though `async with` and `aclose` do so earlier.

    >>> from myserve.sdk.testing import ScriptedTransport, ToyTokenizer
    >>> sampler = DeploymentSampler("http://test", "toy", tokenizer=ToyTokenizer(),
    ...     transport=ScriptedTransport(["4", "four"]))
    >>> completions = asyncio.run(sampler.sample_with_tokens([{"role": "user", "content": "2+2="}], n=2))
    >>> [c.text for c in completions]
    ['4', 'four']
    """

    def __init__(
        self,
        inference_url: str | Sequence[str],
        model: str,
        api_key: str = "",
        tokenizer: Tokenizer | None = None,
        concurrency_controller: FixedConcurrencyController | None = None,
        *,
        run_seed: int | None = None,
        retry: RetryPolicy | None = None,
        dialect: DialectName | None = None,
        stall_timeout: float = 300.0,
        transport: Transport | None = None,
    ) -> None:
        """`inference_url`: the server's root (or OpenAI's base URL); several of them share the load.

        `concurrency_controller`: None means no limit. `run_seed`: gives every (prompt, sample) its seed; None
        draws one a call. `dialect`: None asks the server what it is. `stall_timeout`: seconds without a byte
        after which a connection counts as dead.
        """
        urls = [inference_url] if isinstance(inference_url, str) else list(inference_url)
        if not urls:
            raise ValueError("inference_url is empty: name at least one server")
        self.model = model
        self.tokenizer = tokenizer
        self.run_seed = run_seed
        self.concurrency_controller = concurrency_controller
        self._asked: Counter[int] = Counter()  # how often each prompt was asked, for its next seed
        self.backend = ServerPool(
            deployments=[Deployment(url) for url in urls],
            transport=transport if transport is not None else AiohttpTransport(stall_timeout),
            headers={"authorization": f"Bearer {api_key}", "x-api-key": api_key} if api_key else {},
            retry=retry if retry is not None else RetryPolicy(),
            controller=concurrency_controller,
            fixed_dialect=DIALECTS[dialect] if dialect is not None else None,
        )

    @property
    def stats(self) -> SamplerStats:
        """Counts since the sampler was made."""
        return self.backend.stats

    @property
    def sync(self) -> SyncSampler:
        """The same calls for code that is not async, in a notebook too."""
        return SyncSampler(self)

    async def sample_with_tokens(
        self,
        messages: Messages,
        n: int = 1,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float = 1.0,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Completions:
        """n completions of a chat, in order of their index; the other options are `SampleOptions`.

        `[]` if the prompt alone reaches `max_seq_len`; samples over it are dropped (`Completions.dropped`).
        Raises `SamplingError` for the first sample that fails for good, unless `on_error` says otherwise.
        """
        prompt = self.tokenize(messages, tools=tools, **(chat_template_kwargs or {}))
        call = {"n": n, "max_tokens": max_tokens, "temperature": temperature, **options}
        return await self.draw(self.plan(prompt, call))

    async def sample_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], **options: Unpack[SampleOptions]
    ) -> Completions:
        """The same, from token ids: nothing is tokenized, so nothing can drift."""
        return await self.draw(self.plan(prompt_token_ids, options))

    async def stream_tokens(
        self, prompt: Prompt, **options: Unpack[SampleOptions]
    ) -> AsyncGenerator[SampleDelta]:
        """Text and tokens of all n samples as they arrive. Leaving the loop early aborts the samples."""
        call = self.plan(self.prompt_ids(prompt), options)

        def start(put: Callable[[SampleDelta], None]) -> Awaitable[object]:
            return self.draw(call, on_delta=put)

        async with aclosing(_as_they_come(start)) as deltas:
            async for delta in deltas:
                yield delta

    async def stream_completions(
        self, prompt: Prompt, **options: Unpack[SampleOptions]
    ) -> AsyncGenerator[SampledCompletion]:
        """Whole samples as they finish, the shortest first. Leaving the loop early aborts the others."""
        call = self.plan(self.prompt_ids(prompt), options)

        def start(put: Callable[[SampledCompletion], None]) -> Awaitable[object]:
            def put_wanted(end: SampledCompletion | SamplingError) -> None:
                if isinstance(end, SampledCompletion) and _fits(call, end):
                    put(end)

            return self.draw(call, on_end=put_wanted)

        async with aclosing(_as_they_come(start)) as completions:
            async for completion in completions:
                yield completion

    def sample_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        journal: str | Path | None = None,
        progress: bool = False,
        deadline: float | None = None,
        **options: Unpack[SampleOptions],
    ) -> SampleBatch:
        """n samples of each of many prompts: `await` it for all, in order, or `async for` as they finish.

        `journal`: a JSONL file; a run that was killed goes on from it and asks for nothing twice.
        `progress`: a bar on stderr. `deadline`: seconds for the whole batch.
        """
        return SampleBatch(
            self, prompts, dict(options), journal=journal, progress=progress, deadline=deadline
        )

    async def update_weights(
        self,
        path: str,
        *,
        mode: Mode = "drain",
        partial: bool = False,
        version: int | None = None,
        checksum: str | None = None,
        new_requests: Literal["wait", "refuse"] = "wait",
        reset_prompt_cache: bool = False,
    ) -> list[WeightsReport]:
        """New weights from a folder in each server's weights directory; returns when they are in place everywhere.

        `mode`: what becomes of samples in flight: "drain" lets them finish first, "keep" lets them go on by the new
        weights, "abort" ends them. Raises WeightUpdateError.
        """
        body: dict[str, Any] = {
            "model": self.model, "path": path, "mode": mode, "partial": partial, "version": version,
            "checksum": checksum, "new_requests": new_requests, "reset_prompt_cache": reset_prompt_cache,
        }  # fmt: skip
        return await weights.update_weights(self.backend, body)

    async def hot_load(
        self,
        identity: str,
        *,
        previous_identity: str | None = None,
        reset_prompt_cache: bool = False,
        timeout: float = 600.0,
    ) -> list[Replica]:
        """The same by Fireworks' protocol. With `previous_identity` the snapshot is a part that builds on that one.

        `timeout`: seconds until it must be in place. Raises WeightUpdateError.
        """
        body: dict[str, Any] = {"identity": identity, "reset_prompt_cache": reset_prompt_cache}
        if previous_identity is not None:
            body["incremental_snapshot_metadata"] = {
                "previous_snapshot_identity": previous_identity,
                "compression_format": "none",
                "checksum_format": "none",
            }
        headers = {"fireworks-model": self.model, "fireworks-deployment": self.model}
        return await weights.hot_load(self.backend, headers, body, timeout)

    def tokenize(self, messages: Messages, **template: Any) -> list[int]:
        """The prompt's ids by the tokenizer's chat template, with the generation prompt."""
        if self.tokenizer is None:
            raise ValueError("this sampler has no tokenizer: pass one, or sample_with_prompt_tokens(ids)")
        template = {name: value for name, value in template.items() if value is not None}
        rendered = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, **template
        )
        return as_token_ids(rendered)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids of any kind of prompt: messages, ids, or a text, which is what one user says."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if prompt and isinstance(prompt[0], Mapping):
            return self.tokenize(prompt)  # type: ignore[arg-type]  # a sequence whose first is a mapping: messages
        return as_token_ids(prompt)

    def plan(self, prompt_token_ids: Sequence[int], options: Mapping[str, Any]) -> CallPlan:
        """Understands a call, and gives it its seed."""
        seed = options.get("seed")
        if seed is None:
            seed = self._next_seed(prompt_token_ids)
        return plan(self.model, prompt_token_ids, seed, options)

    def _next_seed(self, prompt_token_ids: Sequence[int]) -> int:
        if self.run_seed is None:
            return random_seed()
        prompt = prompt_seed(self.run_seed, prompt_token_ids, 0)
        self._asked[prompt] += 1
        return prompt_seed(self.run_seed, prompt_token_ids, self._asked[prompt] - 1)

    async def draw(
        self,
        call: CallPlan,
        *,
        known: Mapping[int, SampledCompletion] | None = None,
        on_delta: Callable[[SampleDelta], None] | None = None,
        on_end: Callable[[SampledCompletion | SamplingError], None] | None = None,
    ) -> Completions:
        """Draws what a plan says. `known` samples (by index: a journal's) are not asked for again."""
        known = known or {}
        self.stats.prompts += 1
        if call.is_too_long:
            self.stats.dropped += call.n
            return Completions(dropped=call.n)
        missing = [index for index in range(call.n) if index not in known]
        group = Group(
            call.request,
            missing,
            self.backend,
            on_error=call.on_error,
            decode=self._decode if self.tokenizer is not None else None,
            on_delta=on_delta,
            on_end=on_end,
        )
        if missing:
            await group.run(call.timeout)
        drawn = {track.index: track.completion for track in group.tracks if track.completion is not None}
        whole = [sample for _, sample in sorted({**known, **drawn}.items())]
        fitting = [sample for sample in whole if _fits(call, sample)]
        self.stats.dropped += len(whole) - len(fitting)
        failures = [track.error for track in group.tracks if track.error is not None]
        return Completions(fitting, dropped=len(whole) - len(fitting), failures=failures)

    def _decode(self, token_ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    async def aclose(self) -> None:
        """Closes the connections of the running event loop. The sampler can be used again afterwards."""
        await self.backend.transport.aclose()

    async def __aenter__(self) -> DeploymentSampler:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _fits(call: CallPlan, sample: SampledCompletion) -> bool:
    return call.max_seq_len is None or len(sample.full_tokens) <= call.max_seq_len


async def _as_they_come(start: Callable[[Callable[[T], None]], Awaitable[object]]) -> AsyncGenerator[T]:
    """What `start` puts, until it returns; its exception after what was put before it."""
    queue: asyncio.Queue[T | None] = asyncio.Queue()

    async def run() -> None:
        try:
            await start(queue.put_nowait)
        finally:
            queue.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (item := await queue.get()) is not None:
            yield item
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
