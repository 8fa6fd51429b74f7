"""Pauses: what becomes of requests in flight, of newcomers, and of weights that come meanwhile."""

from __future__ import annotations

from engine.scheduling.test_scheduler import make_scheduler, plan, request, run
from myserve.engine.scheduling.pausing import Pausing
from myserve.engine.scheduling.request import State


def begun() -> tuple[Pausing, list[bool]]:
    scheduler = make_scheduler()
    scheduler.add(request(arrival=0, max_tokens=3))
    run(scheduler)
    return Pausing(scheduler), []


def test_keep_stops_at_once_and_goes_on_from_there() -> None:
    pausing, told = begun()
    scheduler = pausing._scheduler
    pausing.begin("keep", told.append)
    scheduler.add(request(arrival=1))
    assert told == [True] and plan(run(scheduler)) == []
    assert [r.block_table != [] for r in scheduler.running] == [True]
    pausing.end()
    # its next token beside what the newcomer cannot share of its prompt: nothing was computed twice
    assert plan(run(scheduler)) == [("r0", 6, 1), ("r1", 4, 2)]


def test_retract_gives_every_block_back_and_computes_again() -> None:
    pausing, told = begun()
    scheduler = pausing._scheduler
    pausing.begin("retract", told.append)
    assert told == [True] and plan(run(scheduler)) == []
    assert scheduler.running == [] and scheduler.pool.usage == 0
    scheduler.pool.forget_all()
    pausing.end()
    assert plan(run(scheduler)) == [("r0", 0, 7)]


def test_wait_lets_requests_in_flight_finish_and_none_in() -> None:
    pausing, told = begun()
    scheduler = pausing._scheduler
    pausing.begin("wait", told.append)
    scheduler.add(request(arrival=1))
    for _ in range(2):
        assert told == []
        assert [name for name, _, _ in plan(run(scheduler))] == ["r0"]
        pausing.advance()
    assert told == [True] and scheduler.is_paused
    assert [r.state for r in scheduler.waiting] == [State.WAITING]
    pausing.end()
    assert plan(run(scheduler)) == [("r1", 4, 2)]


def test_new_weights_do_not_end_a_wait() -> None:
    """An update that swaps in the midst of it has a drain of its own."""
    pausing, told = begun()
    scheduler = pausing._scheduler
    pausing.begin("wait", told.append)
    scheduler.drain("weights")
    scheduler.change_weights(1)
    pausing.advance()
    scheduler.add(request(arrival=1))
    assert told == [] and [name for name, _, _ in plan(run(scheduler))] == ["r0"]


def test_a_pause_does_not_let_new_weights_in_before_their_drain() -> None:
    pausing, told = begun()
    scheduler = pausing._scheduler
    scheduler.drain("weights")
    pausing.begin("keep", told.append)
    assert not scheduler.is_drained("weights")
    pausing.end()
    assert not scheduler.is_drained("weights")


def test_a_wait_that_is_ended_says_so() -> None:
    pausing, told = begun()
    pausing.begin("wait", told.append)
    pausing.end()
    assert told == [False] and not pausing._scheduler.is_paused


def test_a_pause_can_be_deepened() -> None:
    pausing, told = begun()
    pausing.begin("keep", told.append)
    pausing.begin("retract", told.append)
    assert told == [True, True] and pausing._scheduler.running == []


def test_a_prompt_preempted_in_the_middle_starts_over_with_new_weights() -> None:
    """Its first scores are the old weights'."""
    scheduler = make_scheduler(prefill_chunk=4, max_num_batched_tokens=9)
    half = request(prompt_len=30, arrival=0, needs_prompt_logits=True)
    scheduler.add(half)
    run(scheduler)
    pausing, told = Pausing(scheduler), []
    pausing.begin("retract", told.append)
    assert half in scheduler.change_weights(1)
