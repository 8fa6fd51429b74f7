"""Drafts in planned steps: what they may take, what is taken back, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myserve.engine.drafting.drafts import Draft
from myserve.engine.scheduling.batch import Batch, Limits
from myserve.engine.scheduling.block_tables import MOST_AGAIN
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.row_costs import RowCosts
from myserve.engine.scheduling.scheduler import Scheduler
from myserve.engine.scheduling.speculation import Speculation
from myserve.engine.scheduling.state_slots import StateSlots


class Counting:
    """Proposes 1, 2, 3 and so on."""

    def __init__(self, chance: float = 0.9) -> None:
        self.chance = chance
        self.ended: list[Request] = []

    def propose(self, asked: Sequence[tuple[Request, int]]) -> list[Draft | None]:
        return [self._draft(most) for _, most in asked]

    def _draft(self, most: int) -> Draft:
        chances = tuple(self.chance ** (i + 1) for i in range(most))
        return Draft(tuple(range(1, most + 1)), "counting", chances)

    def end(self, request: Request) -> None:
        self.ended.append(request)


def make(
    num_blocks: int = 64, number: int | None = 3, states: StateSlots | None = None, **limits: int
) -> Scheduler:
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "prefill_chunk": 16, "max_model_len": 64}
    bounds = Limits(**(defaults | limits))
    return Scheduler(
        BlockPool(num_blocks, 4), bounds, Speculation(Counting(), bounds, RowCosts(), number), states
    )


def request(prompt_len: int = 6, max_tokens: int = 8, arrival: int = 0) -> Request:
    prompt = [100 + i for i in range(prompt_len)]
    return Request(
        id=f"r{arrival}",
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        arrival=arrival,
        stop_ids=frozenset([0]),
    )


def step(scheduler: Scheduler, *drawn: list[int | None]) -> Batch:
    batch = scheduler.schedule(0.0)
    scheduler.update(batch, drawn, 1.0)
    scheduler.check_integrity()
    return batch


def test_a_decode_verifies_its_draft_and_keeps_what_is_right() -> None:
    scheduler, one = make(), request()
    scheduler.add(one)
    assert not step(scheduler, [50]).scheduled[0].draft, "a prompt has none"
    (part,) = step(scheduler, [1, 2, 9]).scheduled
    assert (part.start, part.count, part.draft) == (6, 4, (1, 2, 3))
    assert one.token_ids[6:] == [50, 1, 2, 9]
    assert one.num_computed_tokens == 9, "the last is still to run"
    assert (one.num_draft_tokens, one.num_accepted_tokens) == (3, 2)
    counts = scheduler.speculation.counts if scheduler.speculation else None
    assert counts is not None and counts.accepted_by_position == {"0": 1, "1": 1}


def test_a_draft_ends_before_max_tokens_and_the_context() -> None:
    for fields, limits in (({"max_tokens": 3}, {}), ({"max_tokens": 60}, {"max_model_len": 9})):
        scheduler, one = make(**limits), request(**fields)
        scheduler.add(one)
        step(scheduler, [50])
        assert step(scheduler, [1, 2]).scheduled[0].draft == (1,)
        assert one.is_finished and one.num_output_tokens == 3


def test_blocks_of_a_wrong_draft_are_given_back() -> None:
    scheduler, one = make(number=15), request(prompt_len=3, max_tokens=40)
    scheduler.add(one)
    step(scheduler, [50])
    batch = scheduler.schedule(0.0)
    assert len(one.block_table) == 5
    scheduler.update(batch, [[9]], 1.0)
    assert len(one.block_table) == 2 and scheduler.pool.num_free == 62


def test_nothing_is_preempted_for_a_draft() -> None:
    scheduler, one = make(num_blocks=2, number=15), request(prompt_len=5, max_tokens=40)
    scheduler.add(one)
    step(scheduler, [50])
    (part,) = scheduler.schedule(0.0).scheduled
    assert part.draft == (1, 2), "as many as fit the blocks that it has"
    assert scheduler.num_preemptions == 0


def test_a_draft_that_would_lose_is_not_run() -> None:
    for chance, drafted in ((0.9, True), (0.01, False)):
        scheduler, one = make(number=None), request(max_tokens=40)
        assert scheduler.speculation is not None
        scheduler.speculation.drafter = Counting(chance)
        scheduler.add(one)
        step(scheduler, [50])
        assert bool(scheduler.schedule(0.0).scheduled[0].draft) is drafted


def test_beside_prompts_likely_drafts_fill_the_output_layers_rows_and_no_more() -> None:
    for chance, drafted in ((0.9, 6), (0.6, 1), (0.3, 0)):
        scheduler = make(number=None, max_num_seqs=4)
        assert scheduler.speculation is not None
        scheduler.speculation.drafter = Counting(chance)
        scheduler.add(request(max_tokens=40))
        step(scheduler, [50])
        scheduler.add(request(arrival=1, prompt_len=12))
        decode, prompt = step(scheduler, [9], [1]).scheduled
        assert (len(decode.draft), prompt.count, prompt.draft) == (drafted, 8, ())


def test_beside_a_prompt_that_fills_a_recording_nothing_is_drafted() -> None:
    """Two decodes and fourteen tokens are sixteen rows: a seventeenth would run sixteen more for nothing."""
    for chunk, drafted in ((14, 0), (12, 2)):
        scheduler = make(number=None, max_num_seqs=4, prefill_chunk=chunk)
        assert scheduler.speculation is not None
        scheduler.speculation.drafter = Counting(0.9)
        for arrival in range(2):
            scheduler.add(request(max_tokens=40, arrival=arrival))
        step(scheduler, [50], [50])
        scheduler.add(request(arrival=2, prompt_len=40))
        batch = scheduler.schedule(0.0)
        assert sum(len(part.draft) for part in batch.scheduled) == drafted
        assert batch.num_tokens == 16


def test_an_ended_request_is_forgotten_by_the_drafter() -> None:
    scheduler, one = make(), request(max_tokens=1)
    assert scheduler.speculation is not None
    scheduler.add(one)
    step(scheduler, [50])
    assert scheduler.speculation.drafter.ended == [one]  # type: ignore[attr-defined]


def test_a_state_behind_a_wrong_draft_is_let_go_and_the_next_step_computes_it_again() -> None:
    scheduler, one = make(states=StateSlots(4)), request(prompt_len=4)
    scheduler.add(one)
    step(scheduler, [50])
    before = one.state_slot
    assert step(scheduler, [1, 77]).scheduled[0].draft == (1, 2, 3)
    assert (one.state_slot, one.state_lag, one.num_computed_tokens, one.num_pending_tokens) == (
        before,
        2,
        6,
        1,
    )
    (part,) = step(scheduler, [1, 78]).scheduled
    assert (part.start, part.again, part.token_ids) == (4, 2, [50, 1, 77, 1]), "up to the border of its block"
    assert part.is_decode
    assert (one.state_slot != before, one.state_lag, one.num_computed_tokens) == (True, 0, 8)


def test_where_a_state_lags_far_behind_no_draft_is_run() -> None:
    scheduler, one = make(states=StateSlots(4)), request(prompt_len=4, max_tokens=40)
    scheduler.add(one)
    step(scheduler, [50])
    for lag, has_draft in ((MOST_AGAIN, True), (MOST_AGAIN + 1, False)):
        one.state_lag = lag
        assert (scheduler.block_tables.most_drafted(one, 3) > 0) == has_draft


@pytest.mark.parametrize("num_slots", [0, 5], ids=["keys and values", "states too"])
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_lives_keep_integrity(num_slots: int, data: st.DataObject) -> None:
    states = StateSlots(num_slots) if num_slots else None
    scheduler = make(
        num_blocks=9,
        number=data.draw(st.sampled_from([None, 1, 7])),
        states=states,
        max_num_seqs=4,
        max_num_batched_tokens=20,
    )
    scheduler.block_tables.worth_a_state = 3
    held: dict[int, list[int]] = {-1: []}  # the tokens that the state in a slot has taken in
    submitted = [
        request(data.draw(st.integers(1, 14)), data.draw(st.integers(1, 9)), arrival) for arrival in range(6)
    ]
    for one in submitted:
        scheduler.add(one)
    for _ in range(300):
        batch = scheduler.schedule(0.0)
        if not batch.scheduled:
            break
        assert batch.num_tokens <= 20
        for part in batch.scheduled if states else ():
            one = part.request
            assert held[one.state_slot] == one.token_ids[: part.start], "the state is of other tokens"
        for part in batch.scheduled:
            held[part.request.next_state_slot] = [*part.request.token_ids[: part.start], *part.token_ids]
        drawn: list[list[int | None]] = []
        for _, index in batch.draws:
            draft = batch.scheduled[index].draft
            right = data.draw(st.integers(0, len(draft)))
            last = data.draw(st.sampled_from([0, 77, 77, 77, None]))
            drawn.append([*draft[:right], last])
        scheduler.update(batch, drawn, 1.0)
        scheduler.check_integrity()
    assert all(one.is_finished for one in submitted)
    assert scheduler.pool.num_free == 9, "blocks leaked"
    assert states is None or states.num_free == num_slots, "slots leaked"
