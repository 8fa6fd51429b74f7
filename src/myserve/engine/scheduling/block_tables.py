"""The blocks and the state that each request holds: found in the prefix cache, added, shared by forks, given back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from myserve.engine.scheduling.adapter import AdapterVersion
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.state_slots import StateSlots

__all__ = ["MOST_AGAIN", "BlockTables", "CachedPrefix"]

WORTH_A_STATE = 128  # tokens: to end a step at their border takes some hundredths of what they take
MOST_AGAIN = 8  # rows that are run once more for a state; behind more, a step goes without a draft


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Full blocks of the prefix cache that hold the first `num_tokens` tokens of a request."""

    blocks: list[int] = field(default_factory=list)
    content_ids: list[int] = field(default_factory=list)  # the cache's names of them
    num_tokens: int = 0
    state_slot: int = -1  # of a model with recurrent layers: the state after them
    # that the cache has blocks of; with recurrent layers it may have a state behind fewer
    known_tokens: int = 0


class BlockTables:
    """Keep `block_table`, `content_ids` and the state slots of the requests that run on one pool of blocks.

    A step reads a request's `state_slot` and writes `next_state_slot`, which `commit` makes the former. So a state is
    never written over while somebody may read it: a step can be run again, and forks share a slot instead of copying.
    Behind a draft that was wrong the state is of no use: the old one stays, and lags behind (`Request.state_lag`).
    """

    def __init__(self, pool: BlockPool, states: StateSlots | None = None) -> None:
        """`states`: of a model with recurrent layers; None: it keeps nothing but keys and values."""
        self._pool = pool
        self.states = states
        self.worth_a_state = WORTH_A_STATE

    @property
    def slots_ever_held(self) -> int:
        """Slots from this one on have never been handed out."""
        return self.states.num_ever_held if self.states is not None else 0

    def find_cached(self, request: Request, weight_version: int) -> CachedPrefix:
        """Return the longest prefix of a request that the cache has, computed by these weights and its adapter.

        At least one token is always left to run, for its logits are what the next token is drawn from. A model with
        recurrent layers finds a prefix that has its state kept, too.
        """
        if request.needs_prompt_logits and request.num_output_tokens == 0:
            return CachedPrefix()
        tokens = request.token_ids[: request.num_tokens - 1]
        blocks, content_ids = self._pool.match(_root(request, weight_version, request.adapter), tokens)
        slot, known = -1, len(blocks) * self._pool.block_size
        if self.states is not None:
            while content_ids and (found := self.states.find(content_ids[-1])) is None:
                del blocks[-1], content_ids[-1]
            slot = found if content_ids and found is not None else -1
        return CachedPrefix(blocks, content_ids, len(blocks) * self._pool.block_size, slot, known)

    def has_room(self, prefix: CachedPrefix, count: int) -> bool:
        """Return whether the pool has blocks for a cached prefix and `count` tokens after it."""
        if self.states is not None:
            # that of a prefix counts as free until it is held, as its blocks do
            taken = int(prefix.state_slot >= 0 and not self.states.is_held(prefix.state_slot))
            if self.states.num_free < 1 + taken:
                return False
        # a cached block that no request holds counts as free until it is held
        newly_held = sum(1 for block in prefix.blocks if not self._pool.is_held(block))
        needed = self._pool.blocks_for(prefix.num_tokens + count) - len(prefix.blocks)
        return needed + newly_held <= self._pool.num_free

    def begin(self, request: Request, prefix: CachedPrefix) -> None:
        """Let a request without blocks begin with a cached prefix."""
        self._pool.hold(prefix.blocks)
        request.block_table, request.content_ids = list(prefix.blocks), list(prefix.content_ids)
        request.num_computed_tokens = prefix.num_tokens
        if self.states is not None and prefix.state_slot >= 0:
            self.states.hold(prefix.state_slot)
            request.state_slot = prefix.state_slot
        request.state_borders = self._state_borders(request, prefix)

    def _state_borders(self, request: Request, prefix: CachedPrefix) -> list[int]:
        """Return where a step of a prompt ends so that its state is kept: for what will begin as it does.

        Where other prompts have gone on otherwise, since more of these may come, and at its last block's border. One
        that is close behind the last state is not worth it.
        """
        borders: list[int] = []
        if self.states is not None:
            size, kept = self._pool.block_size, prefix.num_tokens
            for border in (prefix.known_tokens, (request.num_tokens - 1) // size * size):
                if border - kept >= self.worth_a_state:
                    borders.append(border)
                    kept = border
        return borders

    def to_border(self, request: Request, count: int) -> int:
        """Return `count` tokens of a prompt, or fewer: none beyond the next border at which its state is kept."""
        start = request.num_computed_tokens
        return next((at - start for at in request.state_borders if start < at < start + count), count)

    def extend(self, request: Request, count: int) -> bool:
        """Add the blocks that `count` more tokens need. False, and nothing added, where they are not to be had."""
        missing = self._pool.blocks_for(request.num_computed_tokens + count) - len(request.block_table)
        needs_slot = self.states is not None and request.next_state_slot < 0
        if missing > self._pool.num_free or (
            needs_slot and self.states is not None and not self.states.num_free
        ):
            return False
        if missing > 0:
            request.block_table += self._pool.allocate(missing)
        if needs_slot and self.states is not None:
            request.next_state_slot = self.states.allocate()
        return True

    def commit(self, request: Request) -> None:
        """Make the state that a step has left the request's own."""
        if self.states is not None:
            self._release(request.state_slot)
            request.state_slot, request.next_state_slot, request.state_lag = request.next_state_slot, -1, 0

    def judge(self, request: Request, draft: int, accepted: int) -> None:
        """Count a token and `accepted` ones of a draft behind it as computed, and take the state if these are all."""
        request.num_computed_tokens += 1 + accepted
        if self.states is None:
            return
        if accepted == draft:
            self.commit(request)
        else:
            request.state_lag += 1 + accepted

    def most_drafted(self, request: Request, count: int) -> int:
        """Return `count` tokens of a draft, or fewer: with states none beyond a block's border, where one can be kept.

        And none where the state lags far behind.
        """
        if self.states is None:
            return count
        if request.state_lag > MOST_AGAIN:
            return 0
        size = self._pool.block_size
        return min(count, size - 1 - request.num_computed_tokens % size)

    def _release(self, slot: int) -> None:
        if self.states is not None and slot >= 0:
            self.states.release(slot)

    def cut(self, request: Request) -> None:
        """Give back the blocks behind the request's own tokens: those of a draft that was wrong."""
        needed = self._pool.blocks_for(request.num_tokens)
        if len(request.block_table) > needed:
            self._pool.release(request.block_table[needed:])
            del request.block_table[needed:]

    def room_of(self, request: Request) -> int:
        """Return how many tokens more fit the blocks that the request has."""
        return len(request.block_table) * self._pool.block_size - request.num_computed_tokens

    def can_fork(self, leader: Request) -> bool:
        """Return whether a sibling can share the leader's prompt: its partly filled last block needs a copy."""
        return self._pool.num_free >= (1 if leader.num_prompt_tokens % self._pool.block_size else 0)

    def fork(self, leader: Request, sibling: Request) -> list[tuple[int, int]]:
        """Share the leader's full prompt blocks with a sibling; return what is to be copied: (from, to) or nothing."""
        full, rest = divmod(leader.num_prompt_tokens, self._pool.block_size)
        shared = leader.block_table[:full]
        self._pool.hold(shared)
        sibling.block_table, sibling.content_ids = list(shared), []
        sibling.num_computed_tokens = leader.num_prompt_tokens
        if self.states is not None:  # what the step at hand will leave
            sibling.state_slot = leader.next_state_slot
            self.states.hold(sibling.state_slot)
        if not rest:
            return []
        sibling.block_table += self._pool.allocate(1)
        return [(leader.block_table[full], sibling.block_table[full])]

    def give_back(self, request: Request) -> None:
        """Take all blocks from a request: none of its tokens counts as computed any more."""
        self._pool.release(request.block_table)
        request.block_table, request.content_ids = [], []
        request.num_computed_tokens = 0
        self._release(request.state_slot)
        self._release(request.next_state_slot)
        request.state_slot = request.next_state_slot = -1
        request.state_lag = 0

    def publish_full(self, request: Request) -> None:
        """Name the request's full blocks for the prefix cache."""
        size = self._pool.block_size
        for index in range(len(request.content_ids), request.num_computed_tokens // size):
            root = _root(request, request.weight_version, request.first_adapter)
            parent = request.content_ids[-1] if request.content_ids else root
            tokens = request.token_ids[index * size : (index + 1) * size]
            request.content_ids.append(self._pool.publish(request.block_table[index], parent, tokens))
        is_at_border = request.num_computed_tokens % size == 0 and not request.state_lag
        if self.states is not None and is_at_border and request.content_ids:
            self._publish_state(self.states, request)

    def _publish_state(self, states: StateSlots, request: Request) -> None:
        """Name the request's state for the prefix cache; of those of its completion, the last one alone stays."""
        name = request.content_ids[-1]
        if states.find(name) is None:
            states.publish(request.state_slot, name)
            if request.num_computed_tokens > request.num_prompt_tokens:
                if request.kept_state is not None:
                    states.forget(request.kept_state)
                request.kept_state = name


def _root(request: Request, weight_version: int, adapter: AdapterVersion | None) -> Hashable:
    """Return where the names of a request's blocks begin: two versions' blocks are never taken for one another,
    nor those of two adapters.

    Versions only grow, so blocks that older weights began can never be found again, whatever is added to them.
    """
    return (request.cache_root, weight_version, None if adapter is None else adapter.version)
