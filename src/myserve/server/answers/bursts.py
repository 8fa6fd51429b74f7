"""All that a step brought an answer becomes one burst of events, in one pass and one write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from myserve.engine.outputs import Delta
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.generation import Generation
from myserve.server.answers.size import delta_size
from myserve.server.answers.streaming import WRITTEN_INLINE_BYTES, to_json, to_json_in_slices
from myserve.server.answers.writer import AnswerWriter, Body
from myserve.server.choice import Choice
from myserve.server.turns import LOOP_SECONDS
from myserve.wire.fields import GenerationRequest

__all__ = ["bursts_of"]

R = TypeVar("R", bound=GenerationRequest)


async def bursts_of(
    answer: ActiveAnswer[R], writer: AnswerWriter[R], generation: Generation
) -> AsyncGenerator[bytes, None]:
    """Yield the answer's events, framed, up to the one that ends it: what is ready together as one.

    Raises what ended a choice with an error, behind the events before it.
    """
    now = asyncio.get_running_loop().time
    choices = generation.choices
    burst = [writer.encode(to_json(event)) for event in writer.began(choices)]
    running = len(choices)
    try:
        async with aclosing(generation.steps()) as steps:
            async for step in steps:
                began = now()
                for choice, delta in step:
                    if delta.finish_reason is not None:
                        running -= 1
                        answer.keep(choice, writer.said)
                    burst += writer.text_event(choice, delta) or await _written(
                        answer, writer, choice, delta, choices, ends=not running
                    )
                    # all choices of a step may be there at once: nothing here would wait for anything
                    if now() - began > LOOP_SECONDS:
                        yield b"".join(burst)
                        burst.clear()
                        await asyncio.sleep(0)
                        began = now()
                if burst and running:
                    yield b"".join(burst)
                    burst.clear()
        burst += [writer.encode(to_json(event)) for event in writer.ended(choices)]
    except Exception:
        if burst:
            yield b"".join(burst)
        raise
    yield b"".join(burst) + writer.done


async def _written(
    answer: ActiveAnswer[R],
    writer: AnswerWriter[R],
    choice: Choice,
    delta: Delta,
    choices: list[Choice],
    *,
    ends: bool,
) -> list[bytes]:
    """Return the events of one delta; large ones are written in a thread. `ends`: it is the answer's last."""

    def write() -> list[Body]:
        gained = list(writer.gained(choice, delta))
        if ends and answer.request.perf_metrics_in_response:
            gained[-1]["perf_metrics"] = answer.perf_metrics(choices).to_dict()
        return gained

    if delta_size(delta) <= WRITTEN_INLINE_BYTES:
        return [writer.encode(to_json(event)) for event in write()]
    written = await asyncio.to_thread(lambda: [to_json_in_slices(event) for event in write()])
    return [writer.encode(event) for event in written]
