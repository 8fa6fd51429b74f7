"""The scheduler: single moves first, then random lives under check_integrity."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from myserve.engine.scheduling.batch import Batch, Limits
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.request import Event, Request, State
from myserve.engine.scheduling.scheduler import AGEING, Scheduler
from myserve.engine.scheduling.state_slots import StateSlots

EOS = 0


def make_scheduler(
    num_blocks: int = 64, block_size: int = 4, states: StateSlots | None = None, **limits: int
) -> Scheduler:
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "prefill_chunk": 16, "max_model_len": 64}
    return Scheduler(BlockPool(num_blocks, block_size), Limits(**(defaults | limits)), states=states)


def request(prompt_len: int = 6, max_tokens: int = 8, arrival: int = 0, **fields: object) -> Request:
    return Request(
        id=f"r{arrival}",
        prompt_token_ids=[100 + i for i in range(prompt_len)],
        max_tokens=max_tokens,
        arrival=arrival,
        stop_ids=frozenset([EOS]),
        **fields,
    )


def plan(batch: Batch) -> list[tuple[str, int, int]]:
    return [(p.request.id, p.start, p.count) for p in batch.scheduled]


def run(scheduler: Scheduler, token: int | None = 5) -> Batch:
    batch = scheduler.schedule(now=0.0)
    scheduler.update(batch, [[token]] * len(batch.draws), now=1.0)
    scheduler.check_integrity()
    return batch


def test_a_request_is_prefilled_then_decoded_then_gone() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(max_tokens=3))
    assert plan(run(scheduler)) == [("r0", 0, 6)]
    assert plan(run(scheduler)) == [("r0", 6, 1)]
    assert plan(run(scheduler)) == [("r0", 7, 1)]
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 64


def test_requests_join_and_leave_between_steps() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(max_tokens=2))
    run(scheduler)
    scheduler.add(request(arrival=1, max_tokens=2, cache_root="its own"))
    assert plan(run(scheduler)) == [("r0", 6, 1), ("r1", 0, 6)]
    assert plan(run(scheduler)) == [("r1", 6, 1)]


def test_eos_ends_a_request_whatever_the_others_do() -> None:
    scheduler = make_scheduler()
    first, second = request(arrival=0), request(arrival=1)
    scheduler.add(first)
    scheduler.add(second)
    batch = scheduler.schedule(0.0)
    assert scheduler.update(batch, [[EOS], [5]], 1.0) == [(first, "stop")]
    assert plan(run(scheduler)) == [("r1", 6, 1)]


def test_a_failed_row_ends_alone() -> None:
    scheduler = make_scheduler()
    first, second = request(arrival=0), request(arrival=1)
    scheduler.add(first)
    scheduler.add(second)
    batch = scheduler.schedule(0.0)
    assert scheduler.update(batch, [[None], [5]], 1.0) == [(first, "error")]
    assert second.state is State.RUNNING


def test_a_long_prompt_is_chunked_and_does_not_stall_who_decodes() -> None:
    scheduler = make_scheduler(prefill_chunk=8)
    scheduler.add(request(arrival=0, max_tokens=20))
    run(scheduler)
    scheduler.add(request(arrival=1, prompt_len=20))
    assert plan(run(scheduler)) == [("r0", 6, 1), ("r1", 4, 8)]  # its first block was cached by r0
    assert plan(run(scheduler)) == [("r0", 7, 1), ("r1", 12, 8)]


def test_a_short_prompt_overtakes_a_long_one_that_has_not_waited_long() -> None:
    scheduler = make_scheduler(prefill_chunk=8)
    scheduler.add(request(arrival=0, max_tokens=20))
    run(scheduler)
    scheduler.add(request(arrival=1, prompt_len=40, cache_root="1"))
    assert plan(run(scheduler))[-1] == ("r1", 0, 8)
    scheduler.add(request(arrival=2, prompt_len=6, cache_root="2"))
    assert plan(run(scheduler))[1:] == [("r2", 0, 6), ("r1", 8, 2)]


def test_a_long_prompt_that_has_waited_is_overtaken_no_more() -> None:
    scheduler = make_scheduler(prefill_chunk=8)
    scheduler.add(request(arrival=0, max_tokens=20))
    run(scheduler)
    scheduler.add(request(arrival=1, prompt_len=40, cache_root="1"))
    run(scheduler)
    late = request(arrival=2, prompt_len=6, cache_root="2")
    late.times.arrived = 40 / AGEING
    scheduler.add(late)
    batch = scheduler.schedule(now=40 / AGEING)
    assert plan(batch)[1:] == [("r1", 8, 8)]


def test_a_step_with_streams_holds_as_many_prompt_tokens_as_their_pace_allows() -> None:
    scheduler = make_scheduler(
        num_blocks=256, max_num_batched_tokens=256, prefill_chunk=200, max_model_len=1000
    )
    scheduler.add(request(arrival=0, max_tokens=20))
    for prompt_tokens, seconds in ((100, 1.0), (0, 0.1)):
        scheduler.step_costs.observe(1, prompt_tokens, seconds)
    run(scheduler)
    scheduler.add(request(arrival=1, prompt_len=300, cache_root="1"))
    # a prompt token costs 0.01 s and a decode 0.1: three times that are 28 tokens, and 32 rows a recording
    assert plan(scheduler.schedule(0.0))[-1] == ("r1", 0, 31)


def decoding(scheduler: Scheduler, count: int) -> None:
    """Let so many requests decode, a step at a time where few come in at once."""
    for arrival in range(count):
        scheduler.add(request(arrival=arrival, prompt_len=3, max_tokens=20, cache_root=arrival))
    while len(scheduler.running) < min(count, scheduler.limits.num_seqs_at_any_pace or count):
        run(scheduler)


@pytest.mark.parametrize(("pace", "places"), [(0.2, 8), (0.3, 4)])
def test_more_requests_run_side_by_side_as_long_as_a_reader_keeps_up(pace: float, places: int) -> None:
    scheduler = make_scheduler(num_seqs_at_any_pace=4)
    for decodes in range(1, 9):
        scheduler.step_costs.observe(decodes, 0.0, pace)
    decoding(scheduler, 12)
    scheduler.schedule(0.0)
    assert len(scheduler.running) == places


@pytest.mark.parametrize(("num_blocks", "places"), [(64, 8), (20, 4)])
def test_more_requests_run_side_by_side_only_where_all_have_blocks_to_their_ends(
    num_blocks: int, places: int
) -> None:
    """23 tokens take 6 blocks of 4; below the sure number requests come in all the same, and may be preempted."""
    scheduler = make_scheduler(num_blocks=num_blocks, num_seqs_at_any_pace=4)
    decoding(scheduler, 12)
    scheduler.schedule(0.0)
    assert len(scheduler.running) == places


def test_no_number_of_requests_goes_beyond_the_limit() -> None:
    scheduler = make_scheduler(num_seqs_at_any_pace=8)
    decoding(scheduler, 12)
    assert len(scheduler.running) == 8


def test_a_prefill_leaves_room_for_younger_decoders() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=9, prefill_chunk=16)
    scheduler.add(request(arrival=5, prompt_len=2, max_tokens=20, cache_root="its own"))
    run(scheduler)
    scheduler.add(request(arrival=1, prompt_len=30))
    run(scheduler)
    assert plan(run(scheduler)) == [("r5", 3, 1), ("r1", 8, 8)]


def test_a_finished_prefix_is_found_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(prompt_len=9, max_tokens=1))
    run(scheduler)
    again = request(prompt_len=9, arrival=1)
    scheduler.add(again)
    assert plan(run(scheduler)) == [("r1", 8, 1)]
    assert again.num_cached_tokens == 8


def test_a_prompt_that_is_cached_whole_still_runs_its_last_token() -> None:
    scheduler = make_scheduler()
    for arrival in (0, 1):
        scheduler.add(request(prompt_len=8, max_tokens=1, arrival=arrival))
        batch = run(scheduler)
    assert plan(batch) == [("r1", 4, 4)]


def test_prompt_logits_forbid_a_cached_prefix() -> None:
    scheduler = make_scheduler()
    scheduler.add(request(max_tokens=1))
    run(scheduler)
    scheduler.add(request(arrival=1, needs_prompt_logits=True))
    assert plan(run(scheduler)) == [("r1", 0, 6)]


def siblings_of(leader: Request, n: int) -> list[Request]:
    return [
        Request(id=f"r0.{i}", prompt_token_ids=leader.prompt_token_ids, max_tokens=8, index=i)
        for i in range(1, n)
    ]


def test_n_choices_cost_one_prefill_and_share_its_blocks() -> None:
    scheduler = make_scheduler()
    leader = request(prompt_len=6)
    leader.siblings = siblings_of(leader, 3)
    followers = list(leader.siblings)
    scheduler.add(leader)
    batch = run(scheduler)
    assert plan(batch) == [("r0", 0, 6)]
    assert batch.draws == [(leader, 0), (followers[0], 0), (followers[1], 0)]
    assert all(f.block_table[0] == leader.block_table[0] for f in followers)
    assert batch.copies == [(leader.block_table[1], f.block_table[1]) for f in followers]
    assert len(run(scheduler).scheduled) == 3


def test_siblings_that_do_not_fit_queue_like_anyone() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    leader = request(max_tokens=1)
    leader.siblings = siblings_of(leader, 3)
    scheduler.add(leader)
    assert len(run(scheduler).draws) == 2
    assert [r.id for r in scheduler.waiting] == ["r0.2"]
    assert plan(run(scheduler))[-1] == ("r0.2", 4, 2)


def test_an_aborted_leader_frees_its_followers() -> None:
    scheduler = make_scheduler()
    leader = request()
    leader.siblings = siblings_of(leader, 2)
    scheduler.add(leader)
    scheduler.abort(leader)
    assert plan(run(scheduler)) == [("r0.1", 0, 6)]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=4, max_model_len=16)
    old, young = request(arrival=0, max_tokens=10), request(arrival=1, max_tokens=5, cache_root="its own")
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(4):
        run(scheduler)
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert young.state is State.WAITING
    assert young.num_output_tokens == 3
    while scheduler.has_work:
        run(scheduler)
    assert (old.num_output_tokens, young.num_output_tokens) == (10, 5)


def test_priority_runs_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(request(arrival=0, priority=1))
    scheduler.add(request(arrival=1, priority=0))
    assert plan(run(scheduler)) == [("r1", 0, 6)]


@pytest.mark.parametrize("others", [1, 0])
def test_a_less_important_request_makes_way_and_goes_on_later(others: int) -> None:
    """Of two places, and none makes way for an equal."""
    scheduler = make_scheduler(max_num_seqs=2)
    for arrival in range(2):
        scheduler.add(request(arrival=arrival, max_tokens=4, priority=others, cache_root=arrival))
    run(scheduler)
    scheduler.add(request(arrival=2, max_tokens=2, cache_root=2))
    ids = [{name for name, _, _ in plan(run(scheduler))} for _ in range(2)]
    if others:
        assert ids == [{"r0", "r2"}, {"r0", "r2"}]
        assert scheduler.num_preemptions == 1
    else:
        assert ids == [{"r0", "r1"}, {"r0", "r1"}]
        assert scheduler.num_preemptions == 0
    # the one that made way has kept its token
    while scheduler.has_work:
        last = run(scheduler)
    assert [r.id for r, _ in last.draws] == ["r1" if others else "r2"]
    assert last.scheduled[-1].request.num_output_tokens == (4 if others else 2)


def test_blocks_are_made_free_for_a_more_important_prompt() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(request(prompt_len=14, max_tokens=4, priority=1))
    run(scheduler)
    scheduler.add(request(arrival=1, prompt_len=8, max_tokens=2, cache_root="its own"))
    assert plan(run(scheduler)) == [("r1", 0, 8)]


def test_a_move_that_the_table_has_not_is_refused() -> None:
    finished = request()
    finished.apply(Event.ABORT)
    with pytest.raises(AssertionError, match="no way from finished by admit"):
        finished.apply(Event.ADMIT)


def with_states(worth: int, **limits: int) -> Scheduler:
    scheduler = make_scheduler(states=StateSlots(32), **limits)
    scheduler.block_tables.worth_a_state = worth
    return scheduler


def found(scheduler: Scheduler, asked: Request) -> int:
    """The tokens that a request finds in the prefix cache; it is run to its end."""
    scheduler.add(asked)
    while scheduler.has_work:
        run(scheduler)
    return asked.num_cached_tokens


def test_a_prompt_in_small_pieces_leaves_its_state_at_its_last_border() -> None:
    """As beside streams, where a step has room for a few of its tokens: no piece alone is worth a state."""
    scheduler = with_states(worth=12, prefill_chunk=3)
    scheduler.add(request(arrival=5, prompt_len=2, max_tokens=30, cache_root="streams"))
    run(scheduler)
    assert found(scheduler, request(prompt_len=19, max_tokens=1)) == 0
    assert found(scheduler, request(arrival=1, prompt_len=19, max_tokens=1)) == 16


@pytest.mark.parametrize(("worth", "third"), [(12, 16), (20, 0)])
def test_a_state_is_kept_where_prompts_part(worth: int, third: int) -> None:
    """One instruction, and each time another question: the second prompt shows where, the third finds the state."""
    scheduler = with_states(worth)
    prompts = [[*range(100, 118), *range(200 + 50 * i, 207 + 50 * i)] for i in range(3)]
    asked = [Request(id=str(i), prompt_token_ids=prompt, max_tokens=1) for i, prompt in enumerate(prompts)]
    assert [found(scheduler, one) for one in asked] == [0, 0, third]


class RandomLives(RuleBasedStateMachine):
    """Submissions, steps, failures and aborts in any order, on a pool too small for all of them."""

    requests = Bundle("requests")
    num_slots = 0  # of states of recurrent layers; 0: the model has none

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(max_num_seqs=4, max_num_batched_tokens=12, prefill_chunk=5, max_model_len=27)
        self.states = StateSlots(self.num_slots) if self.num_slots else None
        self.scheduler = Scheduler(BlockPool(9, 3), limits, states=self.states)
        self.submitted: list[Request] = []

    @rule(
        target=requests,
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=18),
        max_tokens=st.integers(1, 9),
        n=st.integers(1, 3),
        priority=st.integers(0, 1),
        scored=st.booleans(),
    )
    def submit(self, prompt: list[int], max_tokens: int, n: int, priority: int, scored: bool) -> Request:
        made = [
            Request(
                id=f"{len(self.submitted)}/{index}",
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                index=index,
                stop_ids=frozenset([EOS]),
                priority=priority,
                arrival=len(self.submitted),
                needs_prompt_logits=scored and index == 0,
            )
            for index in range(n)
        ]
        made[0].siblings = made[1:]
        self.scheduler.add(made[0])
        self.submitted += made
        return made[-1]

    @rule(drawn=st.lists(st.sampled_from([EOS, 1, 2, 2, 2, None]), min_size=8, max_size=8))
    def step(self, drawn: list[int | None]) -> None:
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule(0.0)
        assert bool(batch.scheduled) == had_work, "there is work, and nothing is planned"
        assert batch.num_tokens <= 12
        assert all(request.state is State.RUNNING for request, _ in batch.draws)
        self.compute(batch)
        self.scheduler.update(batch, [[token] for token in drawn[: len(batch.draws)]], 0.0)

    def compute(self, batch: Batch) -> None:
        """What a step would do with states; nothing here."""

    @rule(request=requests)
    def abort(self, request: Request) -> None:
        self.scheduler.abort(request)

    @invariant()
    def integrity(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            batch = self.scheduler.schedule(0.0)
            self.scheduler.update(batch, [[1]] * len(batch.draws), 0.0)
        assert all(r.is_finished for r in self.submitted), "a request was forgotten"
        assert self.scheduler.pool.num_free == 9, "blocks leaked"
        assert self.states is None or self.states.num_free == self.num_slots, "slots leaked"


class RandomStates(RandomLives):
    """The same with states, in slots too few for all: what a slot holds is the tokens that its state has taken in."""

    num_slots = 5

    def __init__(self) -> None:
        super().__init__()
        self.scheduler.block_tables.worth_a_state = 3
        self.held: dict[int, list[int]] = {}

    def compute(self, batch: Batch) -> None:
        read = {part.request.state_slot for part in batch.scheduled}
        written = [part.request.next_state_slot for part in batch.scheduled]
        assert len({*written}) == len(written) and -1 not in written, "two requests write one slot"
        assert read.isdisjoint(written), "a step writes what it reads, so it could not be run again"
        for part in batch.scheduled:
            request = part.request
            before = self.held[request.state_slot] if request.state_slot >= 0 else []
            assert before == request.token_ids[: part.start], "the state is of other tokens"
        for part in batch.scheduled:
            self.held[part.request.next_state_slot] = part.request.token_ids[: part.start + part.count]


TestRandomLives = RandomLives.TestCase
TestRandomLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

TestRandomStates = RandomStates.TestCase
TestRandomStates.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    "broken", ["hold", "release"], ids=["a choice that does not hold what it reads", "a slot that is kept"]
)
def test_the_control_a_broken_slot_is_found(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = StateSlots(8)
    scheduler = Scheduler(BlockPool(64, 4), Limits(8, 64, 16, 64), states=states)
    leader, sibling = request(arrival=0), request(arrival=0, index=1)
    leader.siblings = [sibling]
    scheduler.add(leader)
    monkeypatch.setattr(states, broken, lambda slot: None)
    with pytest.raises(AssertionError, match=r"holders differ|released but not held"):
        for _ in range(3):
            run(scheduler)
