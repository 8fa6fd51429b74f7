"""The event loop's side of a request: raw tokens come in from the engine's thread, deltas go out to the caller."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from myserve.core.isolation import failure_of
from myserve.engine.outputs import Delta, FinishReason, PromptLogprob, RequestMetrics, TokenOutput
from myserve.engine.requests.detokenizer import Detokenizer, ReleasedText

__all__ = ["OutcomeReceiver", "RequestStream", "StepOutcome", "Submitted"]


class StepOutcome(Struct, frozen=True):
    """The result of one step for one choice: a token, an end, or both."""

    index: int
    token: TokenOutput | None = None
    finish_reason: FinishReason | None = None
    # the stop id, unless it is an EOS; "max_tokens": a grammar closed early
    stop_reason: int | str | None = None
    hides_token: bool = False  # the token is the EOS or stop id that ended it: it has no text
    error: Exception | None = None
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None


class Submitted(NamedTuple):
    """A request that runs: its caller may end choices of it, and ask what one has cost."""

    seed: int
    abort: Callable[[list[int], FinishReason], None]
    metrics: Callable[[int], RequestMetrics]


class OutcomeReceiver(Protocol):
    """Takes a request's outcomes in on its event loop: a stream, or what passes them on to one elsewhere."""

    def receive(self, outcome: StepOutcome) -> None: ...
    def fail(self, index: int, error: Exception) -> None: ...


class RequestStream(AsyncIterator[Delta]):
    """All n choices of one submission, interleaved as they come; ends when each has had its finish_reason.

    It has one reader. `seed` is the one that is used: the caller's, or one drawn for it. Leaving early? `abort()` (or
    `aclose()`): the choices that are still open end with finish_reason "abort".
    """

    def __init__(
        self,
        request_id: str,
        seed: int,
        detokenizers: list[Detokenizer],
        *,
        abort: Callable[[list[int], FinishReason], None],
        metrics: Callable[[int], RequestMetrics],
    ) -> None:
        self.request_id = request_id
        self.seed = seed
        self._detokenizers = detokenizers
        self._open = set(range(len(detokenizers)))
        self._abort_in_engine = abort
        self._metrics = metrics
        self._ready: deque[Delta] = deque()
        # set while the reader waits; a bare future: an Event costs three times as much a token
        self._awaited: asyncio.Future[None] | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        if not self._ready and not await self._any():
            raise StopAsyncIteration
        return self._ready.popleft()

    async def next_deltas(self) -> Sequence[Delta]:
        """Wait for deltas, and return all that are there, which is all of a step; none when every choice has ended."""
        if not self._ready:
            await self._any()
        deltas, self._ready = self._ready, deque()
        return deltas

    async def _any(self) -> bool:
        """Wait for a delta; False when none will come."""
        while not self._ready and self._open:
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        return bool(self._ready)

    def metrics(self, index: int) -> RequestMetrics:
        """Return what a choice has cost so far, ended or not."""
        return self._metrics(index)

    def abort(self) -> None:
        """End what is still open, with finish_reason "abort" and the text that was held back. Idempotent."""
        aborted = sorted(self._open)
        for index in aborted:
            try:
                self._finish(index, self._detokenizers[index].end(), "abort")
            except Exception as error:
                self.fail(index, error)
        if aborted:
            self._abort_in_engine(aborted, "abort")

    async def aclose(self) -> None:
        self.abort()

    def receive(self, outcome: StepOutcome) -> None:
        """Turn a raw token into text: on the event loop, so that no step of the engine waits for it."""
        index = outcome.index
        if index not in self._open:
            return  # a stop string ended this choice while the engine was a token ahead
        detokenizer = self._detokenizers[index]
        released = ReleasedText()
        if outcome.token is not None and not outcome.hides_token:
            released = detokenizer.feed(outcome.token)
        if released.matched is not None:
            self._finish(index, released, "stop", released.matched, outcome=outcome)
            self._abort_in_engine([index], "stop")
        elif outcome.finish_reason is not None:
            rest = detokenizer.end(outcome.token if outcome.hides_token else None)
            stopped_by: int | str | None = outcome.stop_reason
            self._finish(index, _joined(released, rest), outcome.finish_reason, stopped_by, outcome)
        elif released.tokens or released.text or outcome.prompt_logprobs is not None:
            self._push(Delta(index, released.text, released.tokens, prompt_logprobs=outcome.prompt_logprobs))

    def fail(self, index: int, error: Exception) -> None:
        """End a choice whose text could not be made, with an error; what was held back of it is lost."""
        if index not in self._open:
            return
        self._open.discard(index)
        failure = failure_of(error, "turning its tokens into text")
        self._push(Delta(index, finish_reason="error", error=failure, metrics=self._metrics(index)))
        self._abort_in_engine([index], "error")

    def _finish(
        self,
        index: int,
        released: ReleasedText,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        outcome: StepOutcome | None = None,
    ) -> None:
        self._open.discard(index)
        self._push(
            Delta(
                index,
                released.text,
                released.tokens,
                released.stop_tokens,
                finish_reason=reason,
                stop_reason=stop_reason,
                error=outcome.error if outcome else None,
                prompt_logprobs=outcome.prompt_logprobs if outcome else None,
                metrics=self._metrics(index),
            )
        )

    def _push(self, delta: Delta) -> None:
        self._ready.append(delta)
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)


def _joined(first: ReleasedText, then: ReleasedText) -> ReleasedText:
    return ReleasedText(
        first.text + then.text,
        first.tokens + then.tokens,
        first.stop_tokens + then.stop_tokens,
    )
