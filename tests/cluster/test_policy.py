"""Routing: sessions first, then the longest prefix by blocks, and no replica far over its share."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from myserve.cluster.policy import BLOCK_SIZE, Candidate, PrefixIndex, Router, blocks_of, load_bound


def idle(count: int) -> list[Candidate]:
    return [Candidate(f"r{number}", 0) for number in range(count)]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=length)


def test_prompts_share_the_blocks_before_their_first_difference() -> None:
    one = prompt(1, 100)
    other = [*one[:50], 7, *one[51:]]
    shared = [a == b for a, b in zip(blocks_of(one), blocks_of(other), strict=True)]
    # 50 is in the fourth block
    assert shared == [True] * (50 // BLOCK_SIZE) + [False] * 4


def test_what_caches_must_agree_on_is_in_every_name() -> None:
    one = prompt(1, 100)
    assert not set(blocks_of(one, "alice")) & set(blocks_of(one, "bob"))


def test_the_next_turn_of_a_conversation_goes_where_the_last_one_went() -> None:
    router, turn = Router(), prompt(2, 64)
    first = router.choose(blocks_of(turn), 64, idle(8))
    busy = [Candidate(c.name, 3 if c.name == first.name else 0) for c in idle(8)]
    longer = turn + prompt(3, 40)
    route = router.choose(blocks_of(longer), len(longer), busy)
    assert (route.name, route.reason, route.hit_tokens) == (first.name, "prefix", 64)


def test_control_without_its_index_the_next_turn_goes_to_the_least_load() -> None:
    first = Router().choose(blocks_of(prompt(2, 64)), 64, idle(8))
    busy = [Candidate(c.name, 3 if c.name == first.name else 0) for c in idle(8)]
    longer = prompt(2, 64) + prompt(3, 40)
    assert Router().choose(blocks_of(longer), len(longer), busy).name != first.name


def test_requests_of_one_short_prompt_stay_together() -> None:
    router, names = Router(), set()
    for done in range(4):
        blocks = blocks_of([1, 2, 3])
        candidates = [Candidate(c.name, done if c.name in names else 0) for c in idle(4)]
        names.add(router.choose(blocks, 3, candidates).name)
    assert len(names) == 1


def test_a_session_stays_whatever_its_prompts_are_and_few_move_when_a_replica_goes() -> None:
    def homes(count: int) -> dict[str, str]:
        router = Router()
        return {
            name: router.choose(blocks_of(prompt(number, 20)), 20, idle(count), session=name).name
            for number, name in enumerate(f"s{number}" for number in range(300))
        }

    eight, seven = homes(8), homes(7)
    assert homes(8) == eight
    assert min(Counter(eight.values()).values()) > 15
    moved = {name for name in eight if eight[name] != seven[name]}
    assert moved == {name for name in eight if eight[name] == "r7"}


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=60),
    count=st.integers(1, 6),
    seed=st.integers(0, 3),
    session=st.sampled_from(["", "s"]),
)
def test_no_replica_is_over_the_bound_though_all_share_a_prompt(
    sizes: list[int], count: int, seed: int, session: str
) -> None:
    router, load = Router(), Counter({c.name: 0 for c in idle(count)})
    for n in sizes:
        candidates = [Candidate(name, load[name]) for name in sorted(load)]
        route = router.choose(blocks_of(prompt(seed, 40)), 40, candidates, n=n, session=session)
        bound = load_bound([c.load for c in candidates], n)
        assert load[route.name] + n <= bound or load[route.name] == min(load.values())
        load[route.name] += n


def test_the_index_forgets_what_was_not_used_for_longest() -> None:
    index = PrefixIndex(most_blocks=10)
    index.add([1, 2, 3, 4, 5], "a")
    index.add([11, 12, 13, 14, 15], "b")
    index.add([1, 2], "a")
    index.add([21, 22, 23], "b")
    assert len(index) == 10
    # of the first, its end is gone; what was used again is there
    assert index.match([1, 2, 3, 4, 5]) == {"a": 2}
    assert index.match([21, 22, 23]) == {"b": 3}
