"""Steps recorded by shape and replayed: decodes by their number; where prompts come in, in one with room to spare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from myserve.core.isolation import raise_if_of_the_device
from myserve.engine.scheduling.scheduler import ScheduledTokens
from myserve.engine.scheduling.step_costs import padded_rows
from myserve.engine.steps.inputs import Shape, StepInputs
from myserve.engine.steps.recorder import NotRecordableError

__all__ = [
    "LARGEST",
    "LARGEST_DECODE",
    "MOST_REQUESTS",
    "MOST_ROWS",
    "RECORDINGS_AT_START",
    "STEPS_BETWEEN_RECORDINGS",
    "Forward",
    "Recorded",
    "RecordedSteps",
    "Shapes",
    "likely_shapes",
    "shape_for",
    "shape_of_decode",
]

log = logging.getLogger(__name__)

MOST_REQUESTS = 64  # beyond, what Python adds to a step no longer shows
MOST_ROWS = 576
# requests of a step that is not all decodes; never a number of rows, which are even
_ROOM = MOST_REQUESTS + 1
_WANTED = (1, 8, 32, MOST_REQUESTS)
# While requests run, at most one shape is recorded in so many steps; the others wait for an idle moment.
STEPS_BETWEEN_RECORDINGS = 50
RECORDINGS_AT_START = 8  # by the self-test, and by a first request that comes before any idle moment

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


class Record(Protocol):
    """Makes recordings; each of its ways raises NotRecordableError for a forward pass that cannot be one."""

    @property
    def ahead(self) -> Callable[[Callable[[], Tensor]], Recorded] | None:
        """Records without computing; None where only a pass that runs can be recorded."""

    def __call__(self, forward: Callable[[], Tensor]) -> Recorded: ...
    def prefault(self) -> bool: ...


def shape_for(scheduled: Sequence[ScheduledTokens], wanted: int) -> Shape | None:
    """Return the shape of the recording that has room for a step; None where the step is too large for any.

    A decode has its very number of requests: there, a row more costs. Where prompts come in, a multiple of 32 rows
    does, which is what a full chunk has anyway.
    """
    requests, rows = len(scheduled), sum(part.count for part in scheduled)
    if rows == requests == wanted and requests <= MOST_REQUESTS:
        return Shape(requests, requests, requests)
    padded = padded_rows(rows)
    if requests > MOST_REQUESTS or padded > MOST_ROWS or wanted > MOST_REQUESTS:
        return None
    return Shape(padded, _ROOM, next(room for room in _WANTED if wanted <= room))


def likely_shapes() -> Iterator[Shape]:
    """Yield every shape that `shape_for` gives, the likeliest first: of one request, then of a few, then of many."""
    rows_of_prefills = sorted({padded_rows(rows) for rows in range(1, MOST_ROWS + 1)})
    yield from (Shape(n, n, n) for n in range(1, 5))
    for wanted in _WANTED:
        yield from (Shape(rows, _ROOM, wanted) for rows in rows_of_prefills)
        yield from (Shape(n, n, n) for n in range(5, 17) if wanted == 1)
    yield from (Shape(n, n, n) for n in range(17, MOST_REQUESTS + 1))


def shape_of_decode(scheduled: Sequence[ScheduledTokens], wanted: int) -> Shape | None:
    """Return `shape_for` of a step of decodes alone: on a GPU what Python adds to a prompt's step does not show."""
    shape = shape_for(scheduled, wanted)
    return shape if shape is not None and shape.rows == shape.requests else None


class RecordedSteps:
    """The recordings of one model: made while nothing runs (`prepare`), or as a shape runs for the first time.

    The first replay of each kind is compared with the model's own pass before any is believed: a model whose forward
    depends on its data in another way than through tensors shows it there, and goes on unrecorded.
    """

    def __init__(
        self, forward: Forward, inputs: StepInputs, record: Record | None, shapes: Shapes = shape_for
    ) -> None:
        """`inputs`: room for the largest step; all recordings share it, for one runs at a time."""
        self._forward, self._inputs, self._record_pass, self._shapes = forward, inputs, record, shapes
        self._steps: dict[Shape, tuple[StepInputs, Recorded]] = {}
        self._proved: set[bool] = set()  # of steps with room to spare; of those without
        self.usable = record is not None
        self._ahead = self._shapes_ahead()
        # steps until the next recording is allowed, and recordings that need not wait
        self._wait, self._allowed = 0, RECORDINGS_AT_START

    def logits(self, scheduled: Sequence[ScheduledTokens], wanted: Sequence[int]) -> Tensor | None:
        """[wanted, V], in memory that the next step writes again; None where the step is not one to record."""
        shape = self._shapes(scheduled, len(wanted)) if self.usable else None
        if shape is None:
            return None
        self._wait -= 1
        if shape not in self._steps and not (self._allowed or self._wait < 0):
            shape = self._with_room_for(shape)
            if shape is None:
                return None
        inputs, recording = self._steps.get(shape) or (self._inputs.cut(shape), None)
        inputs.fill(scheduled, wanted)
        logits = self._record(shape, inputs) if recording is None else self._replay(shape, inputs, recording)
        return logits[: len(wanted)]

    def prepare(self) -> bool:
        """Record one more of the likely shapes without computing it; False when there is none left.

        Takes what Python takes for a forward pass (some 0.1 s), so it is called while nothing else is to do.
        """
        if not self.usable or self._record_pass is None or self._record_pass.ahead is None:
            return False
        if self._record_pass.prefault():
            return True
        shape = next((shape for shape in self._ahead if shape not in self._steps), None)
        if shape is None:
            return False
        inputs = self._inputs.cut(shape)
        try:
            self._steps[shape] = inputs, self._record_pass.ahead(lambda: self._forward(inputs))
        except NotRecordableError as reason:
            self._give_up(str(reason))
        except Exception as error:
            raise_if_of_the_device(error)
            # no request has asked for this shape: the step that does will raise, and fail its own
            log.warning("shapes are not recorded ahead: %r", error)
            self._ahead = iter(())
        return True

    def clear(self) -> None:
        """Forget all recordings: what they read has moved."""
        self._steps.clear()
        self._ahead = self._shapes_ahead()

    def _shapes_ahead(self) -> Iterator[Shape]:
        return likely_shapes() if self._shapes is shape_for else iter(())

    def _with_room_for(self, shape: Shape) -> Shape | None:
        """The smallest shape recorded that a step of `shape` can run in, where the rows more cost less than Python."""
        is_decode = shape.rows == shape.requests
        most = 2 * shape.rows if is_decode else shape.rows + shape.rows // 4
        fitting = (
            other
            for other in self._steps
            if (other.rows == other.requests) == is_decode
            and shape.rows <= other.rows <= most
            and shape.wanted <= other.wanted
        )
        return min(fitting, key=lambda other: (other.rows, other.wanted), default=None)

    def _record(self, shape: Shape, inputs: StepInputs) -> Tensor:
        assert self._record_pass is not None
        try:
            recording = self._record_pass(lambda: self._forward(inputs))
        except NotRecordableError as reason:
            self._give_up(str(reason))
            return self._forward(inputs)
        self._steps[shape] = inputs, recording
        self._allowed = max(0, self._allowed - 1)
        self._wait = STEPS_BETWEEN_RECORDINGS
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
