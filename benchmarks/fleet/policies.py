"""Other routers, to compare with ours: in turns, the lesser load of two, and the tree of prefixes of Ray's LLM server.

Each has `myserve.cluster.policy.Router.choose`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from myserve.cluster.policy import Candidate, Route

__all__ = ["POLICIES", "PrefixTreeOfRay", "RoundRobin", "TwoChoices"]

# Ray's router follows prefixes from this share of a prompt on
MATCH_RATE = 0.1


class RoundRobin:
    """Takes turns: what a load balancer does that knows nothing."""

    def __init__(self) -> None:
        self._next = 0

    def choose(
        self, blocks: Sequence[int], num_tokens: int, candidates: Sequence[Candidate], **_: object
    ) -> Route:
        self._next += 1
        return Route(candidates[self._next % len(candidates)].name, "load", 0)


class TwoChoices:
    """The lesser load of two at random: Serve's default router."""

    def __init__(self) -> None:
        self._rng = random.Random(0)

    def choose(
        self, blocks: Sequence[int], num_tokens: int, candidates: Sequence[Candidate], **_: object
    ) -> Route:
        some = self._rng.sample(candidates, min(2, len(candidates)))
        return Route(min(some, key=lambda c: c.load).name, "load", 0)


class PrefixTreeOfRay:
    """`PrefixCacheAffinityRouter`'s rule with its defaults, on Ray's own tree: imported, and asked in this process.

    There the tree is an actor, and prompts are text. Here a block's hash stands for its characters, so that it sees
    prefixes exactly, and costs no call: both to its advantage. Load counts only among those that match equally.
    """

    def __init__(self) -> None:
        from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree

        self._tree = PrefixTree()
        self._known: set[str] = set()

    def choose(
        self, blocks: Sequence[int], num_tokens: int, candidates: Sequence[Candidate], **_: object
    ) -> Route:
        names = [candidate.name for candidate in candidates]
        if new := [name for name in names if name not in self._known]:
            self._tree.add_tenants(new, time.time())
            self._known.update(new)
        text = "".join(f"{block & 0xFFFFFFFF:08x}" for block in blocks)
        matched, holders = self._tree.prefix_match(text, names)
        if len(matched) < MATCH_RATE * len(text):
            holders = self._tree.get_smallest_tenants()
        among = [c for c in candidates if c.name in (holders or ())] or candidates
        chosen = min(among, key=lambda c: c.load).name
        self._tree.insert(text, chosen, time.time())
        return Route(chosen, "load", 0)


POLICIES = {"in turns": RoundRobin, "lesser of two": TwoChoices, "Ray's prefix tree": PrefixTreeOfRay}
