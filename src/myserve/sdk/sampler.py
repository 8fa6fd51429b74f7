"""`DeploymentSampler`: tokenizes prompts, has servers sample from them, and returns checked completions."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, Unpack
from urllib.parse import urlsplit

from myserve.sdk import weights
from myserve.sdk.batch import SampleBatch
from myserve.sdk.concurrency.controllers import FixedConcurrencyController
from myserve.sdk.errors import SamplingError
from myserve.sdk.options import CallPlan, Messages, Prompt, SampleOptions, TokenIds, plan
from myserve.sdk.request import DEFAULT_MAX_TOKENS, as_token_ids
from myserve.sdk.retry import RetryPolicy
from myserve.sdk.sampling import decisions
from myserve.sdk.sampling.decisions import Decisions
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

__all__ = ["DeploymentSampler", "Tokenizer"]

T = TypeVar("T")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used; any object with these two methods will do."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


class DeploymentSampler:
    """Sample from one or several deployments of a model.

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
        """Name the servers; nothing is connected before the first call.

        `inference_url`: the server's root (or OpenAI's base URL); several of them share the load.
        `concurrency_controller`: None means no limit. `run_seed`: gives every (prompt, sample) its seed; None
        draws one a call. `dialect`: None asks the server what it is. `stall_timeout`: seconds without a token
        after which a stream counts as dead (four times that while it waits for its first).
        Raises ValueError for an `inference_url` that is no address.
        """
        urls = [inference_url] if isinstance(inference_url, str) else list(inference_url)
        if not urls:
            raise ValueError("inference_url is empty: name at least one server")
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
                raise ValueError(
                    f"inference_url {url!r} is no address: write http://HOST:PORT or https://HOST"
                )
        self.model = model
        self.tokenizer = tokenizer
        self.run_seed = run_seed
        self.concurrency_controller = concurrency_controller
        # how often each prompt was asked, for its next seed
        self._asked: Counter[int] = Counter()
        self.backend = ServerPool(
            deployments=[Deployment(url) for url in urls],
            transport=transport if transport is not None else AiohttpTransport(stall_timeout),
            api_key=api_key,
            retry=retry if retry is not None else RetryPolicy(),
            stall_timeout=stall_timeout,
            controller=concurrency_controller,
            fixed_dialect=DIALECTS[dialect] if dialect is not None else None,
        )

    @property
    def stats(self) -> SamplerStats:
        """Return the counts since the sampler was made."""
        return self.backend.stats

    @property
    def sync(self) -> SyncSampler:
        """Return these calls for code that is not async, in a notebook too."""
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
        """Return n completions of a chat, in order of their index; the other options are `SampleOptions`.

        `[]` if the prompt alone reaches `max_seq_len`; samples over it are dropped (`Completions.dropped`).
        Raises `SamplingError` for the first sample that fails for good, unless `on_error` says otherwise,
        `SamplingDeadlineError` after `timeout`, ValueError or TypeError for a wrong option.
        """
        prompt = self.tokenize(messages, tools=tools, **(chat_template_kwargs or {}))
        call = {"n": n, "max_tokens": max_tokens, "temperature": temperature, **options}
        return await self.draw(self.plan(prompt, call))

    async def sample_with_prompt_tokens(
        self, prompt_token_ids: TokenIds, **options: Unpack[SampleOptions]
    ) -> Completions:
        """Return n completions of token ids: a list, a numpy array, a torch tensor or a tokenizer's encoding.

        Nothing is tokenized, so nothing can drift. Raises as `sample_with_tokens` does.
        """
        return await self.draw(self.plan(prompt_token_ids, options))

    async def stream_tokens(
        self, prompt: Prompt, **options: Unpack[SampleOptions]
    ) -> AsyncGenerator[SampleDelta]:
        """Yield text and tokens of all n samples as they arrive. Leaving the loop early aborts the samples.

        Raises as `sample_with_tokens` does.
        """
        call = self.plan(self.prompt_ids(prompt), options)

        def start(put: Callable[[SampleDelta], None]) -> Awaitable[object]:
            return self.draw(call, on_delta=put)

        async with aclosing(_as_they_come(start)) as deltas:
            async for delta in deltas:
                yield delta

    async def stream_completions(
        self, prompt: Prompt, **options: Unpack[SampleOptions]
    ) -> AsyncGenerator[SampledCompletion]:
        """Yield whole samples as they finish, the shortest first. Leaving the loop early aborts the others.

        Raises as `sample_with_tokens` does.
        """
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
        prompts: Sequence[Prompt] | TokenIds,
        *,
        journal: str | Path | None = None,
        progress: bool = False,
        deadline: float | None = None,
        **options: Unpack[SampleOptions],
    ) -> SampleBatch:
        """Return n samples of each of many prompts: `await` it for all, in order, or `async for` as they finish.

        `prompts`: a sequence of any kind of prompt; an array or tensor [B, P], or an encoding of several texts without
        padding. `journal`: a JSONL file; a run that was killed goes on from it and asks for nothing twice.
        `progress`: a bar on stderr. `deadline`: seconds for the whole batch.
        Raises as `sample_with_tokens` does, and `JournalError` for a file that is not this run's.
        """
        return SampleBatch(
            self, prompts, dict(options), journal=journal, progress=progress, deadline=deadline
        )

    async def decide(
        self,
        state: str | Sequence[Mapping[str, Any]],
        questions: Sequence[Mapping[str, Any]],
        **options: Any,
    ) -> Decisions:
        """Return the answers to questions about a state, each with the probabilities of its options, in their order.

        `state`: a text, or OpenAI's items of an input. `questions`: OpenAI's, of type "predicate", "choice" or
        "score". `options`: fields of `/v1/decisions`, such as `chat_template_kwargs` and `return_token_ids`.
        Raises `SamplingError`, also for answers that are none to these questions.
        """
        body = {"model": self.model, "input": state, "questions": list(questions), **options}
        return await decisions.decide(self.backend, body, questions)

    async def update_weights(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Mode = "drain",
        partial: bool = False,
        version: int | None = None,
        checksum: str | None = None,
        new_requests: Literal["wait", "refuse"] = "wait",
        reset_prompt_cache: bool = False,
    ) -> list[WeightsReport]:
        """Load weights from a folder in each server's weights directory; return when they are in place everywhere.

        `mode`: what becomes of samples in flight: "drain" lets them finish first, "keep" lets them go on by the new
        weights, "abort" ends them. Raises WeightUpdateError.
        """
        body: dict[str, Any] = {
            "model": self.model, "path": os.fspath(path), "mode": mode, "partial": partial, "version": version,
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
        """Load weights by Fireworks' protocol. With `previous_identity` the snapshot is a part that builds on that one.

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
        """Return the prompt's ids by the tokenizer's chat template, with the generation prompt.

        Raises ValueError without a tokenizer, and whatever the template raises.
        """
        if self.tokenizer is None:
            raise ValueError("this sampler has no tokenizer: pass one, or sample_with_prompt_tokens(ids)")
        template = {name: value for name, value in template.items() if value is not None}
        rendered = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, **template
        )
        return as_token_ids(rendered)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of any kind of prompt: messages, ids, or a text, which is one user's message.

        Ids may come as a list, a numpy array, a torch tensor or a tokenizer's encoding. Raises TypeError or ValueError
        for what is none of these.
        """
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list | tuple) and prompt and _is_message(prompt[0]):
            return self.tokenize(prompt)
        return as_token_ids(prompt)

    def plan(self, prompt_token_ids: TokenIds, options: Mapping[str, Any]) -> CallPlan:
        """Return a call's request, seed included, without asking. Raises ValueError or TypeError, naming the option."""
        ids = as_token_ids(prompt_token_ids)
        seed = options.get("seed")
        if seed is None:
            seed = self._next_seed(ids)
        return plan(self.model, ids, seed, options)

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
        """Return the samples that a plan asks for. `known` ones (by index: a journal's) are not asked for again.

        Raises `SamplingError` as the plan's `on_error` says.
        """
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
        drawn = {s.index: s.completion for s in group.samples if s.completion is not None}
        whole = [sample for _, sample in sorted({**known, **drawn}.items())]
        fitting = [sample for sample in whole if _fits(call, sample)]
        self.stats.dropped += len(whole) - len(fitting)
        failures = [s.error for s in group.samples if s.error is not None]
        return Completions(fitting, dropped=len(whole) - len(fitting), failures=failures)

    def _decode(self, token_ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    async def aclose(self) -> None:
        """Close the connections of the running event loop. The sampler can be used again afterwards."""
        await self.backend.transport.aclose()

    async def __aenter__(self) -> DeploymentSampler:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _is_message(entry: object) -> bool:
    return isinstance(entry, Mapping) and "input_ids" not in entry


def _fits(call: CallPlan, sample: SampledCompletion) -> bool:
    return call.max_seq_len is None or len(sample.full_tokens) <= call.max_seq_len


async def _as_they_come(start: Callable[[Callable[[T], None]], Awaitable[object]]) -> AsyncGenerator[T]:
    """Yield what `start` puts, until it returns; then raise its exception, if it had one."""
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
