"""BlockPool: ids in, ids out."""

from __future__ import annotations

import pytest

from myserve.engine.scheduling.blocks import BlockPool


def pool_with_prefix() -> tuple[BlockPool, list[int]]:
    """Four blocks of two; [1, 2, 3, 4] is cached in the first two, and free."""
    pool = BlockPool(num_blocks=4, block_size=2)
    blocks = pool.allocate(2)
    name = pool.publish(blocks[0], "root", [1, 2])
    pool.publish(blocks[1], name, [3, 4])
    pool.release(blocks)
    return pool, blocks


def test_repr_tells_the_state() -> None:
    pool, _ = pool_with_prefix()
    assert repr(pool) == "BlockPool(4 blocks of 2: 0 held, 4 free, 2 cached)"


def test_match_finds_the_longest_cached_prefix() -> None:
    pool, blocks = pool_with_prefix()
    assert pool.match("root", [1, 2, 3, 4, 5])[0] == blocks
    assert pool.match("root", [1, 2, 9, 9])[0] == blocks[:1]
    assert pool.match("root", [1])[0] == []


def test_another_root_shares_nothing() -> None:
    pool, _ = pool_with_prefix()
    assert pool.match("other", [1, 2, 3, 4])[0] == []


def test_the_same_tokens_behind_another_prefix_are_another_content() -> None:
    pool, _ = pool_with_prefix()
    assert pool.match("root", [3, 4])[0] == []


def test_blocks_that_remember_nothing_go_first_then_the_least_recent_tail() -> None:
    pool, (head, tail) = pool_with_prefix()
    assert {head, tail}.isdisjoint(pool.allocate(2))
    assert pool.allocate(1) == [tail]
    assert pool.match("root", [1, 2, 3, 4])[0] == [head]


def test_a_held_block_is_never_handed_out() -> None:
    pool, blocks = pool_with_prefix()
    pool.hold(blocks)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="asked for 1 blocks, 0 are free"):
        pool.allocate(1)


def test_the_first_of_two_equal_contents_stays_the_cached_one() -> None:
    pool = BlockPool(num_blocks=2, block_size=1)
    first, second = pool.allocate(2)
    assert pool.publish(first, "root", [7]) == pool.publish(second, "root", [7])
    assert pool.match("root", [7])[0] == [first]


def test_release_of_what_is_not_held_is_a_bug() -> None:
    pool, blocks = pool_with_prefix()
    with pytest.raises(AssertionError, match="released but not held"):
        pool.release(blocks)


def test_integrity_sees_a_leak_and_a_double_use() -> None:
    pool, _ = pool_with_prefix()
    taken = pool.allocate(1)
    pool.check_integrity([taken])
    with pytest.raises(AssertionError, match="a leak, or a double use"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="a leak, or a double use"):
        pool.check_integrity([taken, taken])


def test_forget_all_empties_the_cache_and_keeps_the_holders() -> None:
    pool, blocks = pool_with_prefix()
    pool.hold(blocks)
    pool.forget_all()
    assert pool.match("root", [1, 2])[0] == []
    pool.check_integrity([blocks])


def test_the_blocks_that_were_ever_held_are_counted_from_the_first() -> None:
    pool = BlockPool(num_blocks=6, block_size=2)
    assert pool.num_ever_held == 0
    pool.release(pool.allocate(3))
    pool.allocate(2)
    assert pool.num_ever_held == 3
