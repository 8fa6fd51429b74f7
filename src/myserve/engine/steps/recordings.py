"""Steps recorded by shape and replayed: decodes by their number; where prompts come in, in one with room to spare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from myserve.engine.scheduling.scheduler import ScheduledTokens
from myserve.engine.steps.inputs import Shape, StepInputs
from myserve.engine.steps.recorder import NotRecordableError

log = logging.getLogger(__name__)

MOST_REQUESTS = 64  # beyond, what Python adds to a step no longer shows
MOST_ROWS = 576
# requests of a step that is not all decodes; never a number of rows, which are even
_ROOM = MOST_REQUESTS + 1
_WANTED = (1, 8, 32, MOST_REQUESTS)

LARGEST = Shape(MOST_ROWS, _ROOM, MOST_REQUESTS)
LARGEST_DECODE = Shape(MOST_REQUESTS, MOST_REQUESTS, MOST_REQUESTS)

Forward = Callable[[StepInputs], Tensor]  # logits [wanted, V]
Shapes = Callable[
    [Sequence[ScheduledTokens], int], Shape | None
]  # of scheduled and the number of rows wanted


class Recorded(Protocol):
    """A forward pass that has run once: `out` is its result."""

    @property
    def out(self) -> Tensor: ...
    def replay(self) -> Tensor: ...


Record = Callable[[Callable[[], Tensor]], Recorded]  # raises NotRecordableError


def shape_for(scheduled: Sequence[ScheduledTokens], wanted: int) -> Shape | None:
    """The recording that has room for a step; None where the step is too large for any.

    A decode has its very number of requests: there, a row more costs. Where prompts come in, a multiple of 32 rows
    does, which is what a full chunk has anyway.
    """
    requests, rows = len(scheduled), sum(part.count for part in scheduled)
    if rows == requests == wanted and requests <= MOST_REQUESTS:
        return Shape(requests, requests, requests)
    grain = 16 if rows <= 64 else 32
    padded = -(-rows // grain) * grain
    if requests > MOST_REQUESTS or padded > MOST_ROWS or wanted > MOST_REQUESTS:
        return None
    return Shape(padded, _ROOM, next(room for room in _WANTED if wanted <= room))


def shape_of_decode(scheduled: Sequence[ScheduledTokens], wanted: int) -> Shape | None:
    """The same for decodes alone: on a GPU what Python adds to a prompt's step does not show."""
    shape = shape_for(scheduled, wanted)
    return shape if shape is not None and shape.rows == shape.requests else None


class RecordedSteps:
    """The recordings of one model. A shape is recorded as it runs for the first time.

    The first recording of each kind is replayed and compared before any is believed: a model whose forward depends on
    its data in another way than through tensors shows it there, and goes on unrecorded.
    """

    def __init__(
        self, forward: Forward, inputs: StepInputs, record: Record | None, shapes: Shapes = shape_for
    ) -> None:
        """`inputs`: room for the largest step; all recordings share it, for one runs at a time."""
        self._forward, self._inputs, self._record_pass, self._shapes = forward, inputs, record, shapes
        self._steps: dict[Shape, tuple[StepInputs, Recorded]] = {}
        self._proved: set[bool] = set()  # of steps with room to spare; of those without
        self.usable = record is not None

    def logits(self, scheduled: Sequence[ScheduledTokens], wanted: Sequence[int]) -> Tensor | None:
        """[wanted, V], in memory that the next step writes again; None where the step is not one to record."""
        shape = self._shapes(scheduled, len(wanted)) if self.usable else None
        if shape is None:
            return None
        inputs, recording = self._steps.get(shape) or (self._inputs.cut(shape), None)
        inputs.fill(scheduled, wanted)
        logits = self._record(shape, inputs) if recording is None else self._replay(shape, inputs, recording)
        return logits[: len(wanted)]

    def clear(self) -> None:
        """Forget all recordings: what they read has moved."""
        self._steps.clear()

    def _record(self, shape: Shape, inputs: StepInputs) -> Tensor:
        assert self._record_pass is not None
        try:
            recording = self._record_pass(lambda: self._forward(inputs))
        except NotRecordableError as reason:
            self._give_up(str(reason))
            return self._forward(inputs)
        self._steps[shape] = inputs, recording
        return recording.out

    def _replay(self, shape: Shape, inputs: StepInputs, recording: Recorded) -> Tensor:
        replayed = recording.replay()
        kind = shape.rows == shape.requests
        if kind in self._proved:
            return replayed
        self._proved.add(kind)
        own = self._forward(inputs)
        if not torch.equal(own, replayed):
            self._give_up("a replayed step gave other logits")
        return own

    def _give_up(self, reason: str) -> None:
        self.usable = False
        self._steps.clear()
        log.info("steps run unrecorded: %s", reason)
