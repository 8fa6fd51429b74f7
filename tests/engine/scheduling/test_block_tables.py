"""A request's blocks: found, added, shared, given back; the pool's counts are right after each."""

from __future__ import annotations

from myserve.engine.scheduling.block_tables import BlockTables, CachedPrefix
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.request import Request

SIZE = 4


def pool_and_tables(num_blocks: int = 8) -> tuple[BlockPool, BlockTables]:
    pool = BlockPool(num_blocks, SIZE)
    return pool, BlockTables(pool)


def computed(tables: BlockTables, length: int, **asked: object) -> Request:
    """A request whose prompt of `length` tokens has been run."""
    request = Request("r", list(range(length)), max_tokens=4, **asked)  # type: ignore[arg-type]
    tables.begin(request, tables.find_cached(request, 0))
    assert tables.extend(request, request.num_pending_tokens)
    request.num_computed_tokens = length
    tables.publish_full(request)
    return request


def test_a_prefix_is_found_in_whole_blocks_and_leaves_a_token_to_run() -> None:
    _, tables = pool_and_tables()
    first = computed(tables, 8)
    found = tables.find_cached(Request("again", list(range(8)), max_tokens=1), 0)
    assert (found.blocks, found.num_tokens) == (first.block_table[:1], SIZE)
    found = tables.find_cached(Request("longer", list(range(9)), max_tokens=1), 0)
    assert (found.blocks, found.num_tokens) == (first.block_table, 2 * SIZE)


def test_blocks_of_other_weights_and_of_other_salts_are_not_found() -> None:
    _, tables = pool_and_tables()
    computed(tables, 8, cache_root="a")
    other = Request("other", list(range(9)), max_tokens=1, cache_root="b")
    alike = Request("alike", list(range(9)), max_tokens=1, cache_root="a")
    assert tables.find_cached(alike, 0).num_tokens == 8
    assert tables.find_cached(alike, 1) == tables.find_cached(other, 0) == CachedPrefix()


def test_prompt_logits_need_every_position_until_the_first_token() -> None:
    _, tables = pool_and_tables()
    computed(tables, 8)
    scored = Request("scored", list(range(9)), max_tokens=1, needs_prompt_logits=True)
    assert tables.find_cached(scored, 0) == CachedPrefix()
    scored.append(9)
    assert tables.find_cached(scored, 0).num_tokens == 8


def test_cached_blocks_that_nothing_holds_count_as_room_that_is_taken() -> None:
    pool, tables = pool_and_tables(num_blocks=3)
    tables.give_back(computed(tables, 8))
    found = tables.find_cached(Request("again", list(range(13)), max_tokens=1), 0)
    assert pool.num_free == 3 and len(found.blocks) == 2
    assert tables.has_room(found, SIZE)
    assert not tables.has_room(found, SIZE + 1), "its own two blocks were counted as free for the rest"


def test_what_does_not_fit_changes_nothing() -> None:
    pool, tables = pool_and_tables(num_blocks=2)
    request = Request("r", list(range(12)), max_tokens=1)
    assert not tables.extend(request, 12)
    assert request.block_table == [] and pool.num_free == 2
    assert tables.extend(request, 8) and pool.num_free == 0


def test_a_fork_shares_full_blocks_and_copies_the_last() -> None:
    pool, tables = pool_and_tables()
    leader = computed(tables, 6)
    sibling = Request("s", list(range(6)), max_tokens=4)
    assert tables.can_fork(leader)
    [(source, target)] = tables.fork(leader, sibling)
    assert sibling.block_table == [leader.block_table[0], target] and source == leader.block_table[1]
    assert sibling.num_computed_tokens == 6 and pool.is_held(target)
    tables.give_back(leader)
    assert pool.is_held(sibling.block_table[0]), "the sibling lost what it shared"
    tables.give_back(sibling)
    pool.check_integrity([])


def test_a_fork_at_a_block_boundary_needs_no_block() -> None:
    pool, tables = pool_and_tables(num_blocks=2)
    leader = computed(tables, 8)
    sibling = Request("s", list(range(8)), max_tokens=4)
    assert pool.num_free == 0 and tables.can_fork(leader)
    assert tables.fork(leader, sibling) == []
    assert sibling.block_table == leader.block_table
    full = computed_in_part(num_blocks=2)
    assert not full[1].can_fork(full[0])


def computed_in_part(num_blocks: int) -> tuple[Request, BlockTables]:
    """A request that fills the pool, its last block in part."""
    _, tables = pool_and_tables(num_blocks)
    return computed(tables, num_blocks * SIZE - 1), tables


def test_blocks_of_one_content_have_one_name() -> None:
    pool, tables = pool_and_tables()
    first = computed(tables, 8)
    second = Request("r2", list(range(8)), max_tokens=1)
    assert tables.extend(second, 8)
    second.num_computed_tokens = 8
    tables.publish_full(second)
    assert second.content_ids == first.content_ids and second.block_table != first.block_table
    pool.check_integrity([first.block_table, second.block_table])
