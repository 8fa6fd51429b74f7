"""The bound on open completions: exact at its edge, and its estimate is of the durations that were seen."""

from __future__ import annotations

import pytest

from myserve.engine.scheduling.queue_bound import QueueBound
from myserve.errors import OverloadedError


def test_the_limit_itself_fits_and_one_more_does_not() -> None:
    queue = QueueBound(limit=4, side_by_side=2)
    queue.enter(3)
    queue.check(1)
    with pytest.raises(OverloadedError, match="3 completions wait or run, and no more than 4 may"):
        queue.check(2)
    queue.enter(1)
    assert queue.num_open == 4


def test_what_is_refused_is_not_counted() -> None:
    queue = QueueBound(limit=2, side_by_side=1)
    with pytest.raises(OverloadedError):
        queue.enter(3)
    assert queue.num_open == 0


def test_the_wait_grows_with_the_surplus_and_is_a_second_at_least() -> None:
    queue = QueueBound(limit=10, side_by_side=5)
    with pytest.raises(OverloadedError) as early:
        queue.enter(11)
    assert early.value.retry_after == 1.0, "nothing has ended yet"
    for _ in range(200):
        queue.enter(1)
        queue.leave(seconds=30.0)
    waits = []
    for n in (11, 16):
        with pytest.raises(OverloadedError) as caught:
            queue.check(n)
        waits.append(caught.value.retry_after)
    assert waits == pytest.approx([1 / 5 * 30.0, 6 / 5 * 30.0], rel=1e-3)
