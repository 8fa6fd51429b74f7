"""A request's life is its table: every move that is in it works, every other is an assertion; its counts agree."""

from __future__ import annotations

from itertools import product

import pytest

from myserve.engine.scheduling.request import TRANSITIONS, Event, Request, State


def request(**asked: object) -> Request:
    return Request(id="r", prompt_token_ids=[1, 2, 3], max_tokens=2, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_only_moves_of_the_table_are_made(state: State, event: Event) -> None:
    moved = request(state=state)
    if (state, event) in TRANSITIONS:
        moved.apply(event)
        assert moved.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(AssertionError, match=f"request r: no way from {state.value} by {event.value}"):
            moved.apply(event)
        assert moved.state is state


def test_nothing_leads_out_of_the_end_and_every_state_reaches_it() -> None:
    assert not any(state is State.FINISHED for state, _ in TRANSITIONS)
    reaching = {State.FINISHED}
    for _ in State:
        reaching |= {state for (state, _), target in TRANSITIONS.items() if target in reaching}
    assert reaching == set(State)


def test_counts_of_tokens() -> None:
    running = request()
    running.num_computed_tokens = 3
    running.append(9)
    counts = (
        running.num_prompt_tokens,
        running.num_output_tokens,
        running.num_tokens,
        running.num_pending_tokens,
    )
    assert counts == (3, 1, 4, 1)
    assert running.prompt_token_ids == [1, 2, 3], "the completion went into the prompt"


@pytest.mark.parametrize(
    ("ids", "stop_ids", "max_model_len", "reason"),
    [
        ([9], (), 100, None),
        ([9], (9,), 100, "stop"),
        ([9, 8], (), 100, "length"),
        ([9, 8], (8,), 100, "stop"),
        ([9], (), 4, "length"),
    ],
)
def test_ends(ids: list[int], stop_ids: tuple[int, ...], max_model_len: int, reason: str | None) -> None:
    running = request(stop_ids=stop_ids)
    for token_id in ids:
        running.append(token_id)
    assert running.finish_reason(max_model_len) == reason


def test_order_is_priority_then_arrival_then_choice() -> None:
    asked = [(1, 0, 0), (0, 5, 1), (0, 5, 0), (0, 2, 3)]
    made = [request(priority=p, arrival=a, index=i) for p, a, i in asked]
    assert [r.order() for r in sorted(made, key=Request.order)] == sorted(asked)
