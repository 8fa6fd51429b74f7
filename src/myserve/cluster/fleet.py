"""An ingress's requests on the fleet's replicas: each is placed, followed, and placed anew where its replica is lost.

All of it lives on one event loop in a thread of its own, as an engine's steps do; requests come from any other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

from myserve.cluster.channel import Kind, error_from
from myserve.cluster.link import Link
from myserve.cluster.messages import Entry, Member, Members
from myserve.cluster.placed import Placed, PlacedPart, blocks_key
from myserve.cluster.policy import Candidate, Router, blocks_of
from myserve.engine.outputs import FinishReason
from myserve.engine.requests.dispatch import Dispatcher
from myserve.engine.requests.stream import StepOutcome
from myserve.errors import EngineDeadError, OverloadedError

__all__ = ["Directory", "Fleet", "RouteCounts"]

log = logging.getLogger("myserve.cluster")

TICK_SECONDS = 0.25
# a stream waits so long for a replica that can go on with it: one starts in less, with its model's files at hand
PATIENCE_SECONDS = 300.0


class Directory(Protocol):
    """The list of replicas as an ingress learns it: the controller, however it is reached."""

    async def members(self, known: str) -> Members: ...


@dataclass(slots=True)
class RouteCounts:
    """Counts of all that was sent to one replica, and why."""

    requests: Counter[str] = field(default_factory=Counter)  # by reason; "moved": from a lost replica
    prompt_tokens: int = 0
    hit_tokens: int = 0  # of them, those that its cache should have held


class Fleet:
    """The links of one ingress and what runs on them. Every method but `__init__` is for its own loop."""

    def __init__(
        self,
        directory: Directory,
        secret: str,
        *,
        shares_prefixes: bool = False,
        router: Router | None = None,
    ) -> None:
        self.links: dict[str, Link] = {}
        self.counts: defaultdict[str, RouteCounts] = defaultdict(RouteCounts)
        self.num_moved = 0  # choices that went on at another replica
        self.members = Members("", (), 0)
        self._directory = directory
        self._secret = secret
        self._shares_prefixes = shares_prefixes
        self._router = router or Router()
        self._numbers = count()
        self._parts: dict[int, tuple[PlacedPart, Link]] = {}
        self._load: Counter[str] = Counter()  # choices in flight, by replica
        self._parked: dict[PlacedPart, float] = {}
        self._connecting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._joined = asyncio.Event()

    # ---- replicas

    async def run(self) -> None:
        """Follow the list of replicas until cancelled."""
        watching = asyncio.ensure_future(self._watch())
        try:
            while True:
                self._connect_missing()
                self._give_up_parked()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            watching.cancel()

    async def end(self) -> None:
        """Close every link; what still runs is asked for no more."""
        await asyncio.sleep(0)
        for link in list(self.links.values()):
            link.close()
        for task in list(self._tasks):
            task.cancel()
        # in which the transports close their sockets
        await asyncio.sleep(0.01)

    async def first_link(self) -> Link:
        """Wait for a replica and return its link."""
        while not (usable := self._usable()):
            self._joined.clear()
            await self._joined.wait()
        return usable[0]

    @property
    def is_reachable(self) -> bool:
        """True while a replica takes requests."""
        return bool(self._usable())

    @property
    def num_open(self) -> int:
        return sum(self._load.values())

    def _usable(self) -> list[Link]:
        return [
            link
            for link in list(self.links.values())
            if link.is_open
            and not link.is_leaving
            and link.name not in self.members.outside
            and link.status is not None
            and link.status.is_alive
        ]

    async def _watch(self) -> None:
        while True:
            try:
                self.members = await self._directory.members(self.members.generation)
                self._connect_missing()
                if self._usable():
                    # one may have caught up, over the connection that it had
                    self._joined.set()
                    self._place_parked()
            except Exception as error:
                # streams do not pass through the controller: they go on without it
                log.warning("the list of replicas was not had: %s", error)
                await asyncio.sleep(1.0)

    def _connect_missing(self) -> None:
        for member in self.members.members:
            if member.name not in self.links and member.name not in self._connecting:
                self._connecting.add(member.name)
                self._start(self._connect(member))

    async def _connect(self, member: Member) -> None:
        link = Link(member, self._secret, self)
        try:
            await link.open()
        except EngineDeadError as error:
            log.debug("%s", error)
            await asyncio.sleep(1.0)
            return
        finally:
            self._connecting.discard(member.name)
        self.links[member.name] = link
        self._joined.set()
        self._place_parked()

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- requests

    def submit(self, placed: Placed) -> None:
        """Place a request."""
        self._place(PlacedPart(placed, 0, placed.options.n))

    def abort(self, placed: Placed, indices: Sequence[int], reason: FinishReason) -> None:
        """End choices of a request wherever they run; their stream has ended already."""
        placed.open.difference_update(indices)
        for number in list(placed.part_numbers):
            part, link = self._parts[number]
            of_part = [i - part.first for i in indices if part.first <= i < part.first + part.n]
            if of_part:
                link.send(Kind.ABORT, (number, of_part, reason))
                self._close(number, part, link, len(of_part))
        for part in [part for part in self._parked if part.placed is placed and not part.open]:
            del self._parked[part]

    def _place(self, part: PlacedPart) -> None:
        if not part.open:
            return
        link = self._choose(part)
        if link is None:
            self._parked.setdefault(part, asyncio.get_running_loop().time())
            return
        number = next(self._numbers)
        self._parts[number] = part, link
        part.placed.part_numbers.add(number)
        self._load[link.name] += len(part.open)
        part.placed.bits = link.member.bits
        part.placed.tells_class |= len({each.member.bits for each in self.links.values()}) > 1
        link.send(Kind.SUBMIT, (number, part.prompt, part.params, part.options))
        if len(part.open) < part.n:
            ended = [
                i - part.first for i in range(part.first, part.first + part.n) if i not in part.placed.open
            ]
            link.send(Kind.ABORT, (number, ended, "abort"))

    def _choose(self, part: PlacedPart) -> Link | None:
        placed = part.placed
        links = [link for link in self._usable() if link.name not in part.refused_by]
        if placed.bits:
            links = [link for link in links if link.member.bits == placed.bits]
        elif placed.options.session:
            links = _of_one_class(links, placed.options.session)
        if (version := placed.weight_version) is not None:
            # by other weights it would go on as another completion
            same = [
                link for link in links if link.status is not None and link.status.weight_version == version
            ]
            links = same or links
        if not links:
            return None
        prompt, options = part.prompt, part.options
        blocks = blocks_of(prompt, blocks_key(options, self._shares_prefixes))
        candidates = [Candidate(link.name, self.load_of(link)) for link in links]
        route = self._router.choose(blocks, len(prompt), candidates, n=part.n, session=options.session)
        counts = self.counts[route.name]
        counts.requests["moved" if placed.num_moves else route.reason] += 1
        counts.prompt_tokens += len(prompt)
        counts.hit_tokens += route.hit_tokens
        return self.links[route.name]

    def load_of(self, link: Link) -> int:
        """Return the choices that wait or run at a replica: ours, and those of other ingresses as it last said."""
        told = 0 if link.status is None else link.status.load.num_running + link.status.load.num_waiting
        return max(told, self._load[link.name])

    def _close(self, number: int, part: PlacedPart, link: Link, ended: int) -> None:
        self._load[link.name] -= ended
        if not part.open:
            self._forget(number, part)

    def _forget(self, number: int, part: PlacedPart) -> None:
        self._parts.pop(number, None)
        part.placed.part_numbers.discard(number)

    # ---- a replica that is lost

    def _move_all_of(self, link: Link) -> None:
        """Ask for everything that ran there elsewhere."""
        held = [(number, part) for number, (part, at) in self._parts.items() if at is link]
        for number, part in held:
            self._move(number, part, link)

    def _move(self, number: int, part: PlacedPart, link: Link) -> None:
        self._forget(number, part)
        left = part.open
        self._load[link.name] -= len(left)
        link.send(Kind.ABORT, (number, [index - part.first for index in left], "abort"))
        part.placed.num_moves += 1
        self.num_moved += len(left)
        for again in part.again():
            self._place(again)

    def _place_parked(self) -> None:
        parked, self._parked = self._parked, {}
        for part, since in parked.items():
            self._parked[part] = since
            link = self._choose(part)
            if link is not None:
                del self._parked[part]
                self._place(part)

    def _give_up_parked(self) -> None:
        now = asyncio.get_running_loop().time()
        for part in [part for part, since in self._parked.items() if now - since > PATIENCE_SECONDS]:
            del self._parked[part]
            self._fail(
                part, EngineDeadError(f"no replica came in {PATIENCE_SECONDS:g} s that could go on with this")
            )

    def _fail(self, part: PlacedPart, error: Exception) -> None:
        mail = Dispatcher()
        for index in part.open:
            part.placed.open.discard(index)
            mail.add(part.placed, StepOutcome(index, finish_reason="error", error=error))
        mail.send(self._abort_all_of)

    # ---- what links tell

    def on_entries(self, link: Link, entries: list[Entry]) -> None:
        """Hand what a step brought to the streams: each of their loops is woken once."""
        mail = Dispatcher()
        for entry in entries:
            held = self._parts.get(entry.request)
            if held is None or held[1] is not link:
                continue  # it has been aborted, or has gone on elsewhere
            part = held[0]
            if part.first + entry.index not in part.placed.open:
                continue
            if entry.error is not None and self._goes_elsewhere(entry.request, part, link, entry.error):
                continue
            outcome = part.take(entry)
            mail.add(part.placed, outcome)
            if outcome.finish_reason is not None:
                self._close(entry.request, part, link, 1)
        mail.send(self._abort_all_of)

    def _goes_elsewhere(self, number: int, part: PlacedPart, link: Link, error: bytes) -> bool:
        """Move a part whose replica cannot have it, which is no fault of the request."""
        match error_from(error):
            case EngineDeadError():
                link.is_leaving = True  # until it is gone: its engine has ended
                self._move_all_of(link)
                return True
            case OverloadedError() if not part.placed.drawn[part.first]:
                refused = part.refused_by | {link.name}
                if any(other.name not in refused for other in self._usable()):
                    part = replace(part, refused_by=refused)
                    self._parts[number] = part, link
                    self._move(number, part, link)
                    return True
        return False

    def on_status(self, link: Link) -> None:
        """Nothing: the link has kept it."""

    def on_leaving(self, link: Link) -> None:
        """Move what runs there, where there is a place for it; else it runs there to its end."""
        if self._usable():
            self._move_all_of(link)

    def on_lost(self, link: Link) -> None:
        """Forget the replica, and go on elsewhere with what ran there."""
        if self.links.get(link.name) is link:
            del self.links[link.name]
        self._move_all_of(link)
        self._load.pop(link.name, None)

    def _abort_all_of(self, loop: asyncio.AbstractEventLoop) -> None:
        """Abort the requests of an event loop that is closed: no one is left to read them."""
        placed = {part.placed for part, _ in self._parts.values() if part.placed.loop is loop}
        for each in placed:
            with suppress(RuntimeError):
                self.abort(each, sorted(each.open), "abort")


def _of_one_class(links: list[Link], session: str) -> list[Link]:
    """Return the links of one class of bits, the same for each request of a session."""
    classes = sorted({link.member.bits for link in links})
    if len(classes) < 2:
        return links
    chosen = Router().choose([], 0, [Candidate(name, 0) for name in classes], session=session).name
    return [link for link in links if link.member.bits == chosen]
