"""Blocks of the KV cache, by id: their holders, and the prefixes that they still remember. No tensors.

A block is *held* while some request counts on it, and *free* otherwise. A free block may still be *cached*: its
content is named and can be taken up again until the block is handed out for something else (least recently used
first). Names are exact, not hashes: a content's name is looked up by (name of the content before it, its tokens),
so two different prefixes can never be mistaken for one another, whatever their tokens are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from itertools import count

__all__ = ["BlockPool"]

# (name of the parent content, or the cache root; the block's tokens)
ContentKey = tuple[Hashable, tuple[int, ...]]


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each.

    >>> pool = BlockPool(num_blocks=3, block_size=2)
    >>> a, b = pool.allocate(2)
    >>> name = pool.publish(a, "root", [7, 8])
    >>> pool.release([a, b]); pool
    BlockPool(3 blocks of 2: 0 held, 3 free, 1 cached)
    >>> pool.match("root", [7, 8, 9]) == ([a], [name])
    True
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        # first = next out
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(num_blocks))
        self._block_of: dict[ContentKey, int] = {}
        self._name_of: dict[ContentKey, int] = {}
        self._key_of: dict[int, ContentKey] = {}  # block -> the content that it is cached under
        self._names = count(1)
        self.num_ever_held = 0  # blocks from this one on have never been handed out

    def __repr__(self) -> str:
        held = self.num_blocks - len(self._free)
        return (
            f"BlockPool({self.num_blocks} blocks of {self.block_size}: "
            f"{held} held, {len(self._free)} free, {len(self._key_of)} cached)"
        )

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Fraction of the blocks that is held."""
        return 1.0 - len(self._free) / self.num_blocks

    def is_held(self, block: int) -> bool:
        return self._holders[block] > 0

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Take `n` free blocks, forgetting what the least recently used of them had cached."""
        assert n <= len(self._free), f"asked for {n} blocks, {len(self._free)} are free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(n)]
        for block in blocks:
            self._forget(block)
            self._holders[block] = 1
        self.num_ever_held = max([self.num_ever_held, *(block + 1 for block in blocks)])
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each: a shared prefix."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. The last blocks of a sequence become the first to be evicted: a prefix outlives
        what continues it, for without the prefix the rest cannot be found."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is released but not held"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._key_of:  # remembers nothing: hand it out before any that does
                    self._free.move_to_end(block, last=False)

    def match(self, root: Hashable, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The cached blocks that `token_ids` begin with, and their contents' names. Whole blocks only; takes none."""
        blocks: list[int] = []
        names: list[int] = []
        parent = root
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            key = (parent, tuple(token_ids[start : start + self.block_size]))
            block = self._block_of.get(key)
            if block is None:
                break
            parent = self._name_of[key]
            blocks.append(block)
            names.append(parent)
        return blocks, names

    def publish(self, block: int, parent: Hashable, token_ids: Sequence[int]) -> int:
        """Name the content of a full, computed block, so that others may find it. Returns the content's name.

        Where two requests computed the same content side by side, the first one's block stays the cached one.
        """
        key = (parent, tuple(token_ids))
        assert len(key[1]) == self.block_size, "only full blocks are published"
        if key not in self._name_of:
            # its name may hang on a parent that was evicted and came back under a new one
            self._forget(block)
            self._name_of[key] = next(self._names)
            self._block_of[key] = block
            self._key_of[block] = key
        return self._name_of[key]

    def forget_all(self) -> None:
        """Drop every cached content. Held blocks stay held."""
        for block in list(self._key_of):
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key], self._name_of[key]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Each block counts once for each table that lists it, is free when none does, and is named both ways."""
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted == self._holders, "holders differ from the block tables: a leak, or a double use"
        assert all((counted[b] == 0) == (b in self._free) for b in range(self.num_blocks)), (
            "free list is wrong"
        )
        assert {key: block for block, key in self._key_of.items()} == self._block_of, (
            "cache names are out of step"
        )
        assert self._block_of.keys() == self._name_of.keys(), "a name without a block"
