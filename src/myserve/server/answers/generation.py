"""A request on the engine is a stream for each of its prompts, read whole or as it comes, and aborted when left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from myserve.core.params import SamplingParams
from myserve.engine.outputs import Delta, RequestMetrics
from myserve.engine.requests.options import SubmitOptions
from myserve.errors import EngineError, MyserveError
from myserve.server import caller
from myserve.server.answers.pacing import DeltaPacer
from myserve.server.answers.size import CHOICE, check_size, delta_size
from myserve.server.choice import Choice
from myserve.server.models.models import ServedModel
from myserve.server.models.served_engine import ServedStream
from myserve.server.observe import traces
from myserve.server.observe.logs import note
from myserve.server.prompts.sampling import seed_of_prompt
from myserve.server.turns import LoopTurns
from myserve.wire.fields import GenerationRequest

__all__ = ["Generation", "params_of_prompts"]

AT_ONCE = 256  # tasks that begin or end in one turn of the event loop, at 15 µs each

# deltas that came together, by the position of their prompt
_Arrived = Sequence[tuple[int, Sequence[Delta]]]


class Generation:
    """Hold all choices of one request: n for each prompt, numbered prompt by prompt. `begin` makes one."""

    def __init__(self, model: ServedModel, request: GenerationRequest, request_id: str) -> None:
        self._model, self._request, self._request_id = model, request, request_id
        self._n = request.n or 1
        self._interval = (request.stream_interval or 1) if request.stream else 1
        self._in_flight = model.in_flight
        self._in_flight.add(self, request.request_timeout)
        self._cut_by: MyserveError | None = None
        self._ending: asyncio.Task[None] | None = None  # of many prompts; held, or it may be collected
        self._aborted = False  # by a control plane; what is submitted after that ends at once
        self._ids: Sequence[str] = ()  # of the prompts
        self._adapters: Sequence[str | None] = ()
        self._streams: list[ServedStream] = []
        self._paces: list[DeltaPacer] = []
        self.choices: list[Choice] = []
        self.size = 0  # of what `finish` has, in bytes

    @classmethod
    async def begin(
        cls,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        request: GenerationRequest,
        request_id: str,
        request_ids: Sequence[str] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> Generation:
        """Submit every prompt to the engine; the event loop runs other tasks in between.

        `request_ids`: an id for each prompt, where the client named them one by one. `adapters`: one for each prompt.

        Raises what `Engine.submit` raises, and what cut the request meanwhile; then nothing is left running.
        """
        generation = cls(model, request, request_id)
        generation._adapters = adapters or [None] * len(prompts)
        generation._ids = request_ids or [f"{request_id}-{at}" for at in range(len(prompts))]
        try:
            await generation._submit_all(prompts, params)
        except BaseException:
            generation.abort()
            raise
        note(model=request.model, prompt_tokens=sum(map(len, prompts)), choices=len(generation.choices))
        return generation

    async def _submit_all(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        asked, asking = self._request, caller.current(0.0)
        options = SubmitOptions(
            n=self._n,
            request_id=self._request_id,
            priority=asking.priority(asked.priority),
            client=asking.name,
            session=asking.session,
            cache_salt=asked.cache_salt or "",
            sample_index=asked.sample_index or 0,
            num_prior_tokens=asked.num_prior_tokens or 0,
            counts_prior_tokens=bool(asked.counts_prior_tokens),
        )
        turns = LoopTurns()
        for position, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            await turns.take()
            if self._cut_by is not None:
                raise self._cut_by
            if len(prompts) > 1:
                options = replace(options, request_id=self._ids[position])
            if self._adapters[position] != options.adapter:
                options = replace(options, adapter=self._adapters[position])
            stream = self._model.engine.submit(prompt, wanted, options)
            self._streams.append(stream)
            if self._aborted:
                stream.abort()
            for index in range(self._n):
                self.choices.append(Choice(position * self._n + index, position, prompt, stream.seed))
                self._paces.append(DeltaPacer(self._interval))

    def abort(self) -> None:
        """Stop whatever still runs; harmless when all has ended."""
        self._in_flight.remove(self)
        for stream in self._streams:
            stream.abort()

    async def _end(self) -> None:
        """Stop whatever still runs; of thousands of prompts, some at a time."""
        turns = LoopTurns()
        for stream in self._streams:
            stream.abort()
            await turns.take()
        self.abort()

    def abort_requests(self, request_ids: Collection[str] | None) -> int:
        """End the prompts' streams of these ids, or all, with what they have; return how many streams that were."""
        if request_ids is None or self._request_id in request_ids:
            self._aborted = True
            ended = list(self._streams)
        else:
            ended = [s for s, name in zip(self._streams, self._ids, strict=False) if name in request_ids]
        for stream in ended:
            stream.abort()
        return len(ended)

    def cut(self, error: MyserveError) -> None:
        """Stop, and raise `error` in the reader of the events."""
        self._cut_by = error
        if len(self._streams) <= AT_ONCE:
            self.abort()
        else:
            self._in_flight.remove(self)
            self._ending = asyncio.ensure_future(self._end())

    async def steps(self) -> AsyncGenerator[Iterator[tuple[Choice, Delta]], None]:
        """Yield what has come, as it comes, which is all of a step: each delta with its choice.

        A delta is added to its choice when it is read. Reading raises when a choice failed.
        """
        try:
            async with aclosing(_merged(self._streams)) as arrivals:
                async for arrived in arrivals:
                    yield self._taken(arrived)
        finally:
            await self._end()
            traces.record(self._request, self._request_id, self.choices, self._costs)
            note(completion_tokens=sum(len(choice.sampled) for choice in self.choices))

    def _taken(self, arrived: _Arrived) -> Iterator[tuple[Choice, Delta]]:
        try:
            for position, deltas in arrived:
                for delta in deltas:
                    self._raise_if_failed(delta)
                    pace = self._paces[position * self._n + delta.index]
                    ready = pace.take(delta)
                    if ready is not None:
                        yield self._take(position, ready)
        except Exception as error:
            traces.fail(error)
            raise

    def _take(self, position: int, delta: Delta) -> tuple[Choice, Delta]:
        first = position * self._n
        if delta.prompt_logprobs is not None:
            # The prompt was scored once for all of its choices.
            for sibling in self.choices[first : first + self._n]:
                sibling.prompt_logprobs = delta.prompt_logprobs
        choice = self.choices[first + delta.index]
        if sampled := delta.stop_tokens or delta.tokens:
            choice.weight_version = sampled[-1].weight_version
            choice.adapter_version = sampled[-1].adapter_version
        choice.add(delta)
        return choice, delta

    def _raise_if_failed(self, delta: Delta) -> None:
        if delta.finish_reason == "error":
            raise delta.error or EngineError("the engine failed without saying why")
        if delta.finish_reason == "abort" and self._cut_by is not None:
            raise self._cut_by

    def _costs(self) -> list[RequestMetrics]:
        """Return what each choice has cost, those that were left too."""
        return [stream.metrics(index) for stream in self._streams for index in range(self._n)]

    async def finish(self) -> list[Choice]:
        """Return every choice, once all have ended. Raises RequestError when they are too large for one answer."""
        self.size = CHOICE * len(self.choices)
        num_tokens = 0
        turns = LoopTurns()
        async with aclosing(self.steps()) as steps:
            async for step in steps:
                await turns.take()
                for _, delta in step:
                    self.size += delta_size(delta)
                    num_tokens += len(delta.tokens)
                    check_size(self.size, num_tokens)
        return self.choices


def params_of_prompts(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Return the parameters of each prompt: equal but for the seed, where one was given."""
    if params.seed is None:
        return [params] * count
    return [params.with_seed(seed_of_prompt(params.seed, position)) for position in range(count)]


async def _merged(streams: Sequence[ServedStream]) -> AsyncGenerator[_Arrived, None]:
    """Yield the deltas of all streams in the order in which they come."""
    if len(streams) == 1:
        while deltas := await streams[0].next_deltas():
            yield ((0, deltas),)
        return
    waiting: asyncio.Queue[tuple[int, Sequence[Delta]]] = asyncio.Queue()

    async def pump(position: int, stream: ServedStream) -> None:
        while deltas := await stream.next_deltas():
            waiting.put_nowait((position, deltas))
        waiting.put_nowait((position, ()))

    pumps: list[asyncio.Task[None]] = []
    try:
        for position, stream in enumerate(streams):
            pumps.append(asyncio.create_task(pump(position, stream)))
            if position % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        running = len(pumps)
        while running:
            arrived = [await waiting.get()]
            # a step wakes all pumps before it wakes this
            while not waiting.empty():
                arrived.append(waiting.get_nowait())
            running -= sum(not deltas for _, deltas in arrived)
            yield arrived
    finally:
        for at in range(0, len(pumps), AT_ONCE):
            some = pumps[at : at + AT_ONCE]
            for task in some:
                task.cancel()
            await asyncio.gather(*some, return_exceptions=True)
