"""A request on the engine is a stream for each of its prompts, read whole or as it comes, and aborted when left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from myserve.core.params import SamplingParams
from myserve.engine.outputs import Delta, RequestMetrics
from myserve.engine.requests.options import SubmitOptions
from myserve.errors import EngineError, MyserveError
from myserve.server import caller
from myserve.server.answers.pacing import DeltaPacer
from myserve.server.answers.size import check_size, delta_size
from myserve.server.choice import Choice
from myserve.server.models.models import ServedModel
from myserve.server.models.served_engine import ServedStream
from myserve.server.observe import traces
from myserve.server.observe.logs import note
from myserve.server.prompts.sampling import seed_of_prompt
from myserve.wire.fields import GenerationRequest

__all__ = ["Generation", "params_of_prompts"]


class Generation:
    """Hold all choices of one request: n for each prompt, numbered prompt by prompt.

    Raises what `Engine.submit` raises; then nothing is left running.
    """

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        request: GenerationRequest,
        request_id: str,
    ) -> None:
        n = request.n or 1
        options = SubmitOptions(
            n=n,
            request_id=request_id,
            priority=request.priority or 0,
            client=caller.current(0.0).name,
            cache_salt=request.cache_salt or "",
            sample_index=request.sample_index or 0,
            num_prior_tokens=request.num_prior_tokens or 0,
        )
        self._in_flight = model.in_flight
        self._in_flight.add(self, request.request_timeout)
        self._cut_by: MyserveError | None = None
        self._n = n
        self._request, self._request_id = request, request_id
        self.size = 0  # of what `finish` has, in bytes
        self._streams: list[ServedStream] = []
        try:
            for position, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
                if len(prompts) > 1:
                    options = replace(options, request_id=f"{request_id}-{position}")
                self._streams.append(model.engine.submit(prompt, wanted, options))
        except BaseException:
            self.abort()
            raise
        self.choices = [
            Choice(position * n + index, position, prompts[position], stream.seed)
            for position, stream in enumerate(self._streams)
            for index in range(n)
        ]
        note(model=request.model, prompt_tokens=sum(map(len, prompts)), choices=len(self.choices))
        self._paces = [
            DeltaPacer(request.stream_interval or 1 if request.stream else 1) for _ in self.choices
        ]

    def abort(self) -> None:
        """Stop whatever still runs; harmless when all has ended."""
        self._in_flight.remove(self)
        for stream in self._streams:
            stream.abort()

    def cut(self, error: MyserveError) -> None:
        """Stop, and raise `error` in the reader of the events."""
        self._cut_by = error
        self.abort()

    async def events(self) -> AsyncGenerator[tuple[Choice, Delta], None]:
        """Yield each delta with its choice, already added to it, as they come. Raises when a choice failed."""
        try:
            async with aclosing(_merged(self._streams)) as deltas:
                async for position, delta in deltas:
                    self._raise_if_failed(delta)
                    pace = self._paces[position * self._n + delta.index]
                    ready = pace.take(delta)
                    if ready is not None:
                        yield self._take(position, ready)
        except Exception as error:
            traces.fail(error)
            raise
        finally:
            self.abort()
            traces.record(self._request, self._request_id, self.choices, self._costs())
            note(completion_tokens=sum(len(choice.sampled) for choice in self.choices))

    def _take(self, position: int, delta: Delta) -> tuple[Choice, Delta]:
        first = position * self._n
        if delta.prompt_logprobs is not None:
            # The prompt was scored once for all of its choices.
            for sibling in self.choices[first : first + self._n]:
                sibling.prompt_logprobs = delta.prompt_logprobs
        choice = self.choices[first + delta.index]
        if sampled := delta.stop_tokens or delta.tokens:
            choice.weight_version = sampled[-1].weight_version
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
        num_tokens = 0
        async with aclosing(self.events()) as events:
            async for _, delta in events:
                self.size += delta_size(delta)
                num_tokens += len(delta.tokens)
                check_size(self.size, num_tokens)
        return self.choices


def params_of_prompts(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Return the parameters of each prompt: equal but for the seed, where one was given."""
    return [replace(params, seed=seed_of_prompt(params.seed, position)) for position in range(count)]


async def _merged(streams: Sequence[ServedStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield the deltas of all streams in the order in which they come."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()

    async def pump(position: int, stream: ServedStream) -> None:
        async for delta in stream:
            arrived.put_nowait((position, delta))
        arrived.put_nowait((position, None))

    pumps = [asyncio.create_task(pump(position, stream)) for position, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            position, arrival = await arrived.get()
            if arrival is None:
                running -= 1
            else:
                yield position, arrival
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
