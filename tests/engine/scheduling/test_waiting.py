"""Turns between clients: nobody starves behind another's flood, priorities come first, nobody alone is held back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from myserve.engine.scheduling.batch import Limits
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.scheduler import Scheduler


def request(arrival: int, client: str, priority: int = 0, max_tokens: int = 3) -> Request:
    return Request(
        id=f"{client}{arrival}",
        prompt_token_ids=[100 + arrival],
        max_tokens=max_tokens,
        arrival=arrival,
        client=client,
        priority=priority,
    )


def order_of_ends(requests: list[Request], max_num_seqs: int, num_blocks: int = 4096) -> list[str]:
    scheduler = Scheduler(BlockPool(num_blocks, 4), Limits(max_num_seqs, 256, 128, 64))
    for each in requests:
        scheduler.add(each)
    ends: list[str] = []
    while scheduler.has_work:
        batch = scheduler.schedule(now=0.0)
        ends += [r.id for r, _ in scheduler.update(batch, [[5]] * len(batch.draws), now=1.0)]
        scheduler.check_integrity()
    return ends


def test_one_request_does_not_wait_behind_a_thousand() -> None:
    flood = [request(i, "a") for i in range(1000)]
    for max_num_seqs in (1, 16):
        ends = order_of_ends([*flood, request(1000, "b")], max_num_seqs)
        assert ends.index("b1000") <= 2 * max_num_seqs
        flood = [request(i, "a") for i in range(1000)]
    control = order_of_ends([*flood, request(1000, "a")], 16)
    assert control[-1] == "a1000", "as one client's, it is last"


def test_two_floods_have_half_each() -> None:
    ends = order_of_ends(
        [*(request(i, "a") for i in range(200)), *(request(200 + i, "b") for i in range(50))], 8
    )
    of_b = [place for place, name in enumerate(ends) if name.startswith("b")]
    assert of_b[-1] <= 110, "50 of b's are done when some 50 of a's are"


def test_priority_comes_before_fairness() -> None:
    requests = [request(i, "a", priority=-1) for i in range(20)] + [request(20, "b")]
    assert order_of_ends(requests, 4)[-1] == "b20"


def test_who_is_preempted_comes_back_before_new_ones_of_a_client_that_runs_less() -> None:
    scheduler = Scheduler(BlockPool(4, 4), Limits(8, 64, 32, 64))
    old, young, other = request(0, "a", max_tokens=12), request(1, "a", max_tokens=12), request(2, "b")
    for each in (old, young):
        scheduler.add(each)
    while not young.num_preemptions:
        batch = scheduler.schedule(now=0.0)
        scheduler.update(batch, [[5]] * len(batch.draws), now=1.0)
    scheduler.add(other)
    assert scheduler.waiting.next(scheduler.running) is young


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), max_size=30), st.integers(1, 4))
def test_each_client_alone_is_served_in_the_order_of_its_coming(
    asked: list[tuple[str, int]], max_num_seqs: int
) -> None:
    requests = [request(i, client, priority) for i, (client, priority) in enumerate(asked)]
    ends = order_of_ends(requests, max_num_seqs)
    assert sorted(ends) == sorted(r.id for r in requests)
    for client in "abc":
        own = [r.id for r in sorted(requests, key=Request.order) if r.client == client]
        assert [name for name in ends if name.startswith(client)] == own
