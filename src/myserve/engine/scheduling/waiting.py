"""Waiting requests, and the next of them: by priority, then clients in turns, then first come, first served."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import count
from typing import Any

from myserve.engine.scheduling.request import Request

__all__ = ["WaitingRequests"]

Urgency = Callable[[Request], tuple[Any, ...]]
CONSIDERED = 64  # of a client's waiting requests: choosing among thousands would take as long as a small step


class WaitingRequests:
    """Requests without blocks, of several clients. Iterated in `Request.order`, which knows no clients.

    A thousand requests of one client wait a thousand times as long as they need to; another's one waits for its turn.
    What is drawn does not depend on when: turns change no token.

    >>> waiting = WaitingRequests()
    >>> for arrival, client in enumerate("aaab"):
    ...     waiting.add(Request(id=str(arrival), prompt_token_ids=[1], max_tokens=1, arrival=arrival, client=client))
    >>> turns = []
    >>> while (request := waiting.next(running=[])) is not None:
    ...     turns.append(request.client + request.id)
    ...     waiting.admit(request)
    >>> turns
    ['a0', 'b3', 'a1', 'a2']
    """

    def __init__(self) -> None:
        self._of: dict[str, list[Request]] = {}  # by client; each sorted by Request.order, none empty
        self._turns = count(1)
        self._last_turn: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[Request]:
        return merge(*self._of.values(), key=Request.order)

    def add(self, request: Request) -> None:
        insort(self._of.setdefault(request.client, []), request, key=Request.order)

    def remove(self, request: Request) -> None:
        own = self._of[request.client]
        own.remove(request)
        if not own:
            del self._of[request.client]

    def admit(self, request: Request) -> None:
        """Take out a request that is admitted: its client has had a turn."""
        self.remove(request)
        self._last_turn[request.client] = next(self._turns)

    def next(self, running: Iterable[Request], urgency: Urgency = Request.order) -> Request | None:
        """Return the next request: of the client that runs the fewest; of equals, of the one whose last turn is oldest.

        A preempted one goes before all of its priority: it has had its turn, and lost what it had computed.
        """
        heads = [self._head(own, urgency) for own in self._of.values()]
        if len(heads) < 2:
            return heads[0] if heads else None
        runs = Counter(request.client for request in running)

        def place(head: Request) -> tuple[int, bool, int, int, int]:
            turn = self._last_turn.get(head.client, 0)
            return (head.priority, not head.num_preemptions, runs[head.client], turn, head.arrival)

        return min(heads, key=place)

    @staticmethod
    def _head(own: list[Request], urgency: Urgency) -> Request:
        """A client's next: the most urgent of its first few, those that were preempted before all others."""
        return min(own[:CONSIDERED], key=lambda r: (r.priority, not r.num_preemptions, urgency(r)))
