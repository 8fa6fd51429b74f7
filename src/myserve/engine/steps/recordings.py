"""Steps recorded by shape and replayed: decodes by their number; where prompts come in, in one with room to spare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from myserve.core.isolation import raise_if_of_the_device
from myserve.engine.scheduling.batch import ScheduledTokens
from myserve.engine.scheduling.row_costs import ROW_COUNTS, padded_draft_rows
from myserve.engine.scheduling.step_costs import MOST_WANTED, WANTED_ROWS, padded_rows, padded_wanted
from myserve.engine.steps.inputs import Shape, StepInputs
from myserve.engine.steps.recorder import InterruptedRecordingError, NotRecordableError

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
    "draft_shape",
    "likely_shapes",
    "shape_for",
    "shape_of_decode",
]

log = logging.getLogger(__name__)

MOST_REQUESTS = 256  # beyond, what Python adds to a step no longer shows
MOST_ROWS = 576
# Decodes of up to so many requests have a recording for each number; of more, for each multiple of the grain.
_EXACT_DECODES, _DECODE_GRAIN = 64, 16
# requests of a step that is not all decodes; never a number of rows, which are even
_ROOM = MOST_REQUESTS + 1
# While requests run, at most one shape is recorded in so many steps; the others wait for an idle moment.
STEPS_BETWEEN_RECORDINGS = 50
RECORDINGS_AT_START = 12  # by the self-test, and by a first request that comes before any idle moment

LARGEST = Shape(MOST_ROWS, _ROOM, MOST_WANTED)
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
    def ahead(self) -> Callable[[Callable[[], Tensor], Callable[[], bool]], Recorded] | None:
        """Records without computing; None where only a pass that runs can be recorded.

        Raises InterruptedRecordingError as soon as its second argument returns True.
        """

    def __call__(self, forward: Callable[[], Tensor]) -> Recorded: ...
    def prefault(self) -> bool: ...


def shape_for(scheduled: Sequence[ScheduledTokens], wanted: int) -> Shape | None:
    """Return the shape of the recording that has room for a step; None where the step is too large for any.

    A decode of a few has its very number of requests: there, a row more costs. Of many, a multiple of 16. Where drafts
    are verified, every row is wanted, and a few padding rows more than pay for fewer shapes. Where prompts come in, a
    multiple of 32 rows does, which is what a full chunk has anyway.
    """
    requests, rows = len(scheduled), sum(part.count for part in scheduled)
    if rows == requests == wanted and requests <= MOST_REQUESTS:
        room = requests if requests <= _EXACT_DECODES else -(-requests // _DECODE_GRAIN) * _DECODE_GRAIN
        return Shape(room, room, room)
    if rows == wanted <= ROW_COUNTS[-1]:
        return draft_shape(rows)
    padded = padded_rows(rows)
    if requests > MOST_REQUESTS or padded > MOST_ROWS or wanted > MOST_WANTED:
        return None
    return Shape(padded, _ROOM, padded_wanted(wanted))


def draft_shape(rows: int) -> Shape:
    """Return the shape of a step that verifies drafts: every row is wanted."""
    padded = padded_draft_rows(rows)
    return Shape(padded, _ROOM, padded)


def likely_shapes() -> Iterator[Shape]:
    """Yield every shape that `shape_for` gives, the likeliest first: of one request, then of a few, then of many."""
    rows_of_prefills = sorted({padded_rows(rows) for rows in range(1, MOST_ROWS + 1)})
    yield from (Shape(n, n, n) for n in range(1, 5))
    yield from (draft_shape(rows) for rows in ROW_COUNTS if rows <= 16)
    for fewer, wanted in pairwise((0, *WANTED_ROWS)):
        yield from (Shape(rows, _ROOM, wanted) for rows in rows_of_prefills if rows > fewer)
        if wanted == 1:
            # parts of a prompt before its last, which draw nothing
            yield from (Shape(rows, _ROOM, 0) for rows in rows_of_prefills)
            yield from (Shape(n, n, n) for n in range(5, 17))
    yield from (draft_shape(rows) for rows in ROW_COUNTS if rows > 16)
    yield from (Shape(n, n, n) for n in range(17, _EXACT_DECODES + 1))
    more = range(_EXACT_DECODES + _DECODE_GRAIN, MOST_REQUESTS + 1, _DECODE_GRAIN)
    yield from (Shape(n, n, n) for n in more)


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
        self._proved: set[tuple[bool, bool]] = (
            set()
        )  # of steps with room to spare, or without; and with every row wanted
        self.usable = record is not None
        # whether the last step took what such a step will take from now on
        self.was_typical = True
        self._runs_many = False  # whether a step had more requests than `_EXACT_DECODES`
        self._ahead = self._shapes_ahead()
        # steps until the next recording is allowed, and recordings that need not wait
        self._wait, self._allowed = 0, RECORDINGS_AT_START

    def logits(
        self, scheduled: Sequence[ScheduledTokens], wanted: Sequence[int], *, are_read: bool = True
    ) -> Tensor | None:
        """[wanted, V], in memory that the next step writes again; None where the step is not one to record.

        Where they are not read, the step may be run without the model's head: then [0, V].
        """
        shape = self._shapes(scheduled, len(wanted)) if self.usable else None
        self.was_typical = shape is None
        if shape is None:
            return None
        self._wait -= 1
        if len(scheduled) > _EXACT_DECODES and not self._runs_many:
            self._runs_many = True
            self._ahead = self._shapes_ahead()
        headless = replace(shape, wanted=0)
        if not are_read and headless in self._steps and _kind(shape) in self._proved:
            shape, wanted = headless, ()
        if shape not in self._steps and not (self._allowed or self._wait < 0):
            shape = self._with_room_for(shape)
            if shape is None:
                return None
        inputs, recording = self._steps.get(shape) or (self._inputs.cut(shape), None)
        inputs.fill(scheduled, wanted)
        logits = self._record(shape, inputs) if recording is None else self._replay(shape, inputs, recording)
        return logits[: len(wanted)]

    def prepare(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Record one more of the likely shapes without computing it; False when there is none left.

        Takes what Python takes for a forward pass (some 0.1 s), so it is called while nothing else is to do; what is
        begun is dropped as soon as `is_over` returns True.
        """
        if not self.usable or self._record_pass is None or self._record_pass.ahead is None:
            return False
        if self._record_pass.prefault():
            return True
        while self._ahead and self._ahead[-1] in self._steps:
            self._ahead.pop()
        if not self._ahead:
            return False
        shape = self._ahead[-1]
        inputs = self._inputs.cut(shape)
        try:
            recording = self._record_pass.ahead(lambda: self._forward(inputs), is_over)
            if len(recording.out) != shape.wanted:
                raise ValueError(f"{len(recording.out)} rows of logits instead of {shape.wanted}")
            self._steps[shape] = inputs, recording
        except InterruptedRecordingError:
            return True
        except NotRecordableError as reason:
            self._give_up(str(reason))
        except Exception as error:
            raise_if_of_the_device(error)
            if not shape.wanted:  # its head does not run on nothing: it then runs on a row
                self._ahead = [other for other in self._ahead if other.wanted]
                return True
            # no request has asked for this shape: the step that does will raise, and fail its own
            log.warning("shapes are not recorded ahead: %r", error)
            self._ahead.clear()
        return True

    def clear(self) -> None:
        """Forget all recordings: what they read has moved."""
        self._steps.clear()
        self._ahead = self._shapes_ahead()

    def _shapes_ahead(self) -> list[Shape]:
        """The shapes to record, the likeliest last; those of many requests once so many have run."""
        if self._shapes is not shape_for:
            return []
        most = MOST_REQUESTS if self._runs_many else _EXACT_DECODES
        return [shape for shape in likely_shapes() if shape.wanted <= most][::-1]

    def _with_room_for(self, shape: Shape) -> Shape | None:
        """The smallest shape recorded that a step of `shape` can run in, where the rows more cost less than Python."""
        is_decode = shape.rows == shape.requests
        most = 2 * shape.rows if shape.rows == shape.wanted else shape.rows + shape.rows // 4
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
        if _kind(shape) in self._proved:
            self.was_typical = True
            return replayed
        self._proved.add(_kind(shape))
        own = self._forward(inputs)
        if not torch.equal(own, replayed):
            self._give_up("a replayed step gave other logits")
        return own

    def _give_up(self, reason: str) -> None:
        self.usable = False
        self._steps.clear()
        log.info("steps run unrecorded: %s", reason)


def _kind(shape: Shape) -> tuple[bool, bool]:
    """Return whether a shape has no room to spare, and whether every row is wanted: each kind is proved once."""
    return shape.rows == shape.requests, shape.rows == shape.wanted
