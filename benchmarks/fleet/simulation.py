"""The router at sizes that no machine here has: time a request, memory of its index, hits and balance.

`python -m benchmarks.fleet.simulation` prints the table of docs/scale.md. Replicas are simulated as caches of so many
blocks, forgotten by last use, and requests as conversations or as groups of n; the router is the real one.
"""

from __future__ import annotations

import argparse
import random
import time
import tracemalloc
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence

from benchmarks.fleet.policies import POLICIES
from myserve.cluster.policy import BLOCK_SIZE, Candidate, Router, blocks_of

CACHE_BLOCKS = 4096  # of one replica: 65,536 tokens
IN_FLIGHT = 16  # for each replica


class Cache:
    """A replica's prefix cache, by blocks."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def take(self, blocks: Sequence[int]) -> int:
        """Return how many blocks from the first on are there, and keep all."""
        hits = 0
        while hits < len(blocks) and blocks[hits] in self._blocks:
            hits += 1
        for block in blocks:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > CACHE_BLOCKS:
            self._blocks.popitem(last=False)
        return hits


def turns(conversations: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield prompts of conversations with one long system prompt, whose turns come mixed."""
    system = [rng.randrange(50_000) for _ in range(512)]
    ids = [list(system) for _ in range(conversations)]
    for _ in range(6):
        for at in rng.sample(range(conversations), conversations):
            ids[at] = ids[at] + [rng.randrange(50_000) for _ in range(160)]
            yield ids[at]


def groups(prompts: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield eight requests of each prompt, one after the other: GRPO by a client that sends n = 1."""
    for _ in range(prompts):
        prompt = [rng.randrange(50_000) for _ in range(400)]
        for _ in range(8):
            yield prompt


def simulate(router: object, replicas: int, prompts: Iterator[list[int]]) -> tuple[float, float, float]:
    """Return the share of prompt tokens found, microseconds a choice, and the highest load over the mean."""
    caches = {f"r{i}": Cache() for i in range(replicas)}
    load: Counter[str] = Counter(dict.fromkeys(caches, 0))
    running: deque[str] = deque()
    found = total = count = 0
    spent, worst = 0.0, 0.0
    for prompt in prompts:
        began = time.process_time()
        blocks = blocks_of(prompt)
        candidates = [Candidate(name, load[name]) for name in caches]
        route = router.choose(blocks, len(prompt), candidates)  # type: ignore[attr-defined]
        spent += time.process_time() - began
        found += min(caches[route.name].take(blocks) * BLOCK_SIZE, len(prompt))
        total += len(prompt)
        count += 1
        load[route.name] += 1
        running.append(route.name)
        if len(running) > IN_FLIGHT * replicas:
            load[running.popleft()] -= 1
            worst = max(worst, max(load.values()) / IN_FLIGHT)
    return found / total, 1e6 * spent / count, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--replicas", type=int, nargs="*", default=[8, 64, 512])
    args = parser.parse_args()
    print("replicas | traffic | router | hits | us/request | highest load | index MB")
    for replicas in args.replicas:
        for traffic, prompts in (("turns", turns), ("groups", groups)):
            for name, make in {"ours": Router, **POLICIES}.items():
                router = make()
                some = min(40 * replicas, 4000)
                hits, micros, worst = simulate(router, replicas, prompts(some, random.Random(1)))
                size = f"{index_bytes(router) / 1e6:.1f}" if isinstance(router, Router) else ""
                print(f"{replicas} | {traffic} | {name} | {hits:.1%} | {micros:.0f} | {worst:.2f} | {size}")


def index_bytes(router: Router) -> int:
    """Return the memory of a router's index, by making a copy of it."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    copy = OrderedDict((int(str(block)), set(holders)) for block, holders in router.index._holders.items())
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return after - before if copy else 0


if __name__ == "__main__":
    main()
