"""Routing: a request goes to its session's replica, else to the longest cached prefix; never to one too busy.

Pure: no I/O, no clock, no Ray. Whoever asks tells what is in flight, and the choice is data.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

__all__ = ["BLOCK_SIZE", "Candidate", "PrefixIndex", "Route", "Router", "blocks_of", "load_bound"]

BLOCK_SIZE = 16  # tokens, as the engine's own blocks
MOST_BLOCKS = 1 << 20  # that the index remembers, of all replicas together

# A replica may have a quarter more than its share, and a few requests more where all are few: affinity saves a
# prefill, but a queue costs more than that.
BOUND_RATIO = 1.25
BOUND_SLACK = 4

Reason = Literal["session", "prefix", "load"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that takes requests: its name and the choices that wait or run there."""

    name: str
    load: int


@dataclass(frozen=True, slots=True)
class Route:
    """A choice of a replica: why, and how many of the prompt's tokens its cache should hold."""

    name: str
    reason: Reason
    hit_tokens: int


def blocks_of(prompt: Sequence[int], root: str = "") -> list[int]:
    """Return a name for each prefix of whole blocks, and one for the whole prompt. `root`: what caches must agree on.

    Two prompts share as many names as they share whole blocks from the first token on.

    >>> one, two = blocks_of(range(40)), blocks_of([*range(32), 7])
    >>> len(one), one[:2] == two[:2], one[2] == two[2]
    (3, True, False)
    """
    names, name = [], hash(root)
    for at in range(0, len(prompt), BLOCK_SIZE):
        name = hash((name, *prompt[at : at + BLOCK_SIZE]))
        names.append(name)
    return names


def load_bound(loads: Sequence[int], n: int) -> int:
    """Return the most that one replica may have once `n` more choices are in flight.

    >>> load_bound([10, 0], 1), load_bound([100, 100], 8)
    (11, 134)
    """
    return ceil(BOUND_RATIO * (sum(loads) + n) / len(loads)) + BOUND_SLACK


class PrefixIndex:
    """Remembers which replicas have computed which prefixes: a guess of their caches, forgotten by last use.

    A replica that comes in place of another has another name, so the old one's prefixes are never found again.

    >>> index = PrefixIndex()
    >>> index.add([1, 2, 3], "a"); index.add([1, 2], "b")
    >>> index.match([1, 2, 3, 4]) == {"a": 3, "b": 2}, index.match([9])
    (True, {})
    """

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most_blocks = most_blocks
        self._holders: OrderedDict[int, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, blocks: Sequence[int], name: str) -> None:
        """Note that a replica computes these prefixes now."""
        # the longest first, so that of one prompt its end is forgotten first
        for block in reversed(blocks):
            self._holders.setdefault(block, set()).add(name)
            self._holders.move_to_end(block)
        while len(self._holders) > self._most_blocks:
            self._holders.popitem(last=False)

    def match(self, blocks: Sequence[int]) -> dict[str, int]:
        """Return how many of the blocks, from the first on, each replica has computed."""
        found: dict[str, int] = {}
        alive: set[str] | frozenset[str] = frozenset()
        count = 0
        for block in blocks:
            holders = self._holders.get(block)
            if holders is None:
                break
            left = holders if count == 0 else alive & holders
            if len(left) < len(alive):
                found |= dict.fromkeys(alive - left, count)
            if not left:
                return found
            alive, count = left, count + 1
        return found | dict.fromkeys(alive, count)


class Router:
    """Chooses, and remembers what it has chosen.

    Of those that are not over the bound (`load_bound`): the session's replica, by rendezvous hashing, so that every
    ingress agrees without a table and few sessions move when replicas come and go; else the longest prefix; else the
    least load. Ties go to the lesser load, then by name.

    >>> router = Router()
    >>> idle = [Candidate("a", 0), Candidate("b", 0)]
    >>> router.choose(blocks_of(range(64)), 64, idle).name
    'a'
    >>> router.choose(blocks_of([*range(48), 9]), 49, [Candidate("a", 3), Candidate("b", 0)])
    Route(name='a', reason='prefix', hit_tokens=48)
    """

    def __init__(self, index: PrefixIndex | None = None) -> None:
        self.index = index or PrefixIndex()

    def choose(
        self,
        blocks: Sequence[int],
        num_tokens: int,
        candidates: Sequence[Candidate],
        *,
        n: int = 1,
        session: str = "",
    ) -> Route:
        """Return where `n` choices of a prompt go; there is at least one candidate."""
        bound = load_bound([candidate.load for candidate in candidates], n)
        # the least loaded is always within: a request is never refused here
        least = min(candidates, key=_by_load)
        within = [c for c in candidates if c.load + n <= bound or c is least]
        matched = self.index.match(blocks)
        if session and (found := max(candidates, key=lambda c: _weight(session, c.name))) in within:
            chosen, reason = found, "session"
        else:
            # blocks are counted, not tokens: n short prompts that share no whole block still share their name
            chosen = min(within, key=lambda c: (-matched.get(c.name, 0), *_by_load(c)))
            reason = "prefix" if matched.get(chosen.name) else "load"
        hit = min(matched.get(chosen.name, 0) * BLOCK_SIZE, num_tokens)
        self.index.add(blocks, chosen.name)
        return Route(chosen.name, reason, hit)  # type: ignore[arg-type]  # one of the literals above


def _by_load(candidate: Candidate) -> tuple[int, str]:
    return candidate.load, candidate.name


def _weight(session: str, name: str) -> bytes:
    return hashlib.blake2b(f"{session}\0{name}".encode(), digest_size=8).digest()
