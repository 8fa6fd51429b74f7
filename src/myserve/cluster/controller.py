"""The fleet's one list of replicas, and its changes as transactions: all prepare, all swap, then it is published.

Knows no Ray: a deployment of one replica runs it, and whoever joins calls it. It may die at any moment: its decisions
are in the journal before they are carried out, and streams do not pass through it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from myserve.cluster.journal import Adapter, FleetJournal, FleetWeights, JournalStore
from myserve.cluster.link import Link
from myserve.cluster.messages import Entry, Member, Members, Standing
from myserve.errors import EngineDeadError, EngineError, RequestError

__all__ = ["Controller", "ControllerLostError", "Peer"]

log = logging.getLogger("myserve.cluster")

T = TypeVar("T")

SILENT_SECONDS = 15.0  # a member that has not called for so long is gone
SETTLE_SECONDS = 2.5  # of a controller's life, in which every replica has called it
WATCH_SECONDS = 10.0  # that `members` waits for a change


class ControllerLostError(EngineError):
    """The controller has died during a call: the journal says whether it was decided."""


class Peer(Protocol):
    """A replica as the controller calls it."""

    async def call(self, method: str, **args: Any) -> Any: ...
    def close(self) -> None: ...


class Controller:
    """Used on one event loop. `store` keeps the journal; None: in memory alone, so another one does not know it.

    `connect` returns an open peer; by default a `Link` that shows `secret`.
    """

    def __init__(
        self,
        secret: str,
        store: JournalStore | None = None,
        connect: Callable[[Member], Awaitable[Peer]] | None = None,
    ) -> None:
        self._secret = secret
        self._store = store
        self._connect = connect or self._open_link
        self.journal = FleetJournal() if store is None else FleetJournal.read(store)
        self._members: dict[str, Member] = {}
        self._heard: dict[str, float] = {}
        self._expelled: set[str] = set()
        self._behind: set[str] = set()  # they lack a change that is published
        self._epoch, self._count = secrets.token_hex(4), 0
        self._changed = asyncio.Event()
        self._changing = asyncio.Lock()  # one transaction at a time; nobody joins in the midst of it
        # it may have taken another's place: a transaction now would find no replica, or leave some behind
        self._settled_at = time.monotonic() + SETTLE_SECONDS
        self._settle_pending()

    def _settle_pending(self) -> None:
        """Carry on where an earlier controller has died.

        Prepared and not decided: replicas drop it when their connection ends, so nothing was changed. Decided: it is
        published; a replica that has not swapped is behind, is in no member list until it has caught up, and says so.
        """
        pending = self.journal.pending
        if pending is None:
            return
        if self.journal.phase == "swap":
            log.warning(
                "weights %d were decided by a controller that died: published", pending.weight_version
            )
            self._record(replace(self.journal.with_change(pending), pending=None, phase="idle"))
        else:
            log.warning("weights %d were prepared by a controller that died: dropped", pending.weight_version)
            self._record(replace(self.journal, pending=None, phase="idle"))

    # ---- replicas

    async def heartbeat(self, member: Member) -> Standing:
        """Take a replica into the list, or keep it there. Called once a second by each, from its load on."""
        journal = self.journal
        if member.name in self._expelled:
            return Standing(is_expelled=True)
        if self._changing.locked():
            # known ones stay; a new one waits, or it would miss what is being decided
            if is_known := member.name in self._members:
                self._heard_of(member.name)
            return Standing(is_known)
        known = self._members.get(member.name)
        if known is not None:
            # a call that was on its way while a transaction ended says what was so before
            member = replace(
                member,
                weight_version=max(member.weight_version, known.weight_version),
                num_adapter_changes=max(member.num_adapter_changes, known.num_adapter_changes),
            )
        missing = journal.missing(member.weight_version, member.num_adapter_changes)
        if missing:
            self._drop(member.name)
            if member.name not in self._behind:
                self._behind.add(member.name)
                self._note_change()
            return Standing(False, False, missing, journal.paused, journal.released)
        self._behind.discard(member.name)
        self._heard_of(member.name)
        is_new = known is None
        if known != member:
            self._members[member.name] = member
            self._note_change()
        return Standing(True, paused=journal.paused, released=journal.released) if is_new else Standing(True)

    def is_member(self, name: str) -> bool:
        return name in self._members

    async def leave(self, name: str) -> None:
        """Take a replica off the list: it ends."""
        self._behind.discard(name)
        self._drop(name)

    async def members(self, known: str = "") -> Members:
        """Return the fleet, at once where it is not the `known` generation, else when it has changed or after 10 s."""
        self._drop_silent()
        if known == self._generation:
            self._changed.clear()
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                self._drop_silent()
        journal = self.journal
        return Members(
            self._generation,
            tuple(self._members.values()),
            journal.weight_version,
            journal.phase,
            journal.checksum,
            frozenset(self._behind | self._expelled),
        )

    # ---- changes

    async def update_weights(self, name: str, **options: Any) -> dict[str, Any]:
        """Put new weights in place everywhere, as one, and return the report of `WeightReport`'s fields.

        `name` is the transaction's. `options`: a snapshot's fields, `version` among them, by default the next. Raises
        RequestError, and what a replica raised that could not prepare: nothing was changed.
        """
        async with self._transaction():
            return await self._update(name, self._next(**options))

    def _next(self, version: int | None = None, **fields: Any) -> FleetWeights:
        current = self.journal.weight_version
        version = current + 1 if version is None else version
        if version <= current:
            raise RequestError(
                f"the version must grow, or tokens of different weights would look alike: it is {current}, got "
                f"{version}",
                param="version",
            )
        return FleetWeights(weight_version=version, **fields)

    async def _update(self, name: str, change: FleetWeights) -> dict[str, Any]:
        peers = await self._peers()
        try:
            self._record(replace(self.journal, pending=change, phase="prepare"))
            ready = await self._prepare(peers, name, change)
            # decided: from here on every replica, new ones too, goes to these weights
            self._record(replace(self.journal, phase="swap"))
            reports = await self._on_each(ready, "swap_weights", transaction=name)
        except BaseException:
            if self.journal.phase == "prepare":
                self._record(replace(self.journal, pending=None, phase="idle"))
            raise
        finally:
            for peer in peers.values():
                peer.close()
        good = {member: report for member, report in reports.items() if isinstance(report, dict)}
        for member in self._members.keys() - good.keys():
            self._expel(member, reports.get(member))
        checksum = next((report["checksum"] for report in good.values()), change.checksum)
        published = self.journal.with_change(replace(change, checksum=checksum))
        self._record(replace(published, pending=None, phase="idle"))
        for member in good.keys() & self._members.keys():  # one may have left meanwhile
            self._members[member] = replace(self._members[member], weight_version=change.weight_version)
        self._note_change()
        if not good:
            raise EngineError(
                f"every replica was lost while it swapped: those that come back have version {change.weight_version}"
            )
        return _slowest(list(good.values()))

    async def _prepare(self, peers: dict[str, Peer], name: str, change: FleetWeights) -> dict[str, Peer]:
        """Have all prepare; return those that have. Raises what one raised, once all have dropped it again.

        A replica that dies is none that refuses: the others go on, and it comes back with what is published then.
        """
        results = await self._on_each(peers, "prepare_weights", transaction=name, change=change)
        refusals = [
            e for e in results.values() if isinstance(e, BaseException) and not isinstance(e, EngineDeadError)
        ]
        ready = {m: peer for m, peer in peers.items() if not isinstance(results[m], BaseException)}
        if refusals or not ready:
            await self._on_each(ready, "withdraw_weights", transaction=name)
            raise refusals[0] if refusals else EngineDeadError("no replica is left that could take weights")
        return ready

    async def change_adapter(self, change: Adapter) -> Any:
        """Load or unload an adapter everywhere; return what the first replica says. Raises what one raises.

        It is tried on one replica first: what is wrong with the files fails there, and nothing was changed.
        """
        async with self._transaction():
            peers = await self._peers()
            try:
                first, *others = sorted(peers)
                version = await peers[first].call("adapter", change=change)
                self._record(self.journal.with_change(change))
                rest = {member: peers[member] for member in others}
                results = {first: None, **await self._on_each(rest, "adapter", change=change)}
                for member, result in results.items():
                    if isinstance(result, BaseException):
                        self._expel(member, result)
                    elif (known := self._members.get(member)) is not None:
                        count = known.num_adapter_changes + 1
                        self._members[member] = replace(known, num_adapter_changes=count)
            finally:
                for peer in peers.values():
                    peer.close()
            self._note_change()
            return version

    async def everywhere(self, method: str, **args: Any) -> None:
        """Have every replica do one of pause, resume, forget_prefixes, release_memory, restore_memory."""
        async with self._transaction():
            peers = await self._peers()
            try:
                results = await self._on_each(peers, method, **args)
            finally:
                for peer in peers.values():
                    peer.close()
            failed = [e for e in results.values() if isinstance(e, BaseException)]
            failed = [e for e in failed if not isinstance(e, EngineDeadError)] or failed[
                : len(results) == len(failed)
            ]
            if failed:
                raise failed[0]
            self._record(_noted(self.journal, method, args))

    # ---- pieces

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        if (left := self._settled_at - time.monotonic()) > 0:
            await asyncio.sleep(left)
        async with self._changing:
            yield

    async def _peers(self) -> dict[str, Peer]:
        """Return every member that can be reached. Raises EngineDeadError where there is none."""
        members = list(self._members.values())
        opened = await asyncio.gather(*(self._connect(m) for m in members), return_exceptions=True)
        found = {}
        for member, peer in zip(members, opened, strict=True):
            if isinstance(peer, BaseException):
                self._drop(member.name)
            else:
                found[member.name] = peer
        if not found:
            raise EngineDeadError("no replica is left: try again once one is back")
        return found

    @staticmethod
    async def _on_each(peers: dict[str, Peer], method: str, **args: Any) -> dict[str, Any]:
        """Call all side by side; a failure stands in place of its answer."""
        calls: list[Coroutine[Any, Any, Any]] = [peer.call(method, **args) for peer in peers.values()]
        return dict(zip(peers, await asyncio.gather(*calls, return_exceptions=True), strict=True))

    async def _open_link(self, member: Member) -> Peer:
        link = Link(member, self._secret, _Unmoved())
        await link.open()
        return link

    def _record(self, journal: FleetJournal) -> None:
        if self._store is not None:
            journal.write(self._store)
        self.journal = journal
        self._note_change()

    def _expel(self, name: str, why: object) -> None:
        log.error("the replica %s leaves the fleet: it did not take what the others have (%s)", name, why)
        self._expelled.add(name)
        self._drop(name)

    def _drop(self, name: str) -> None:
        self._heard.pop(name, None)
        if self._members.pop(name, None) is not None:
            self._note_change()

    def _heard_of(self, name: str) -> None:
        self._heard[name] = asyncio.get_running_loop().time()

    def _drop_silent(self) -> None:
        now = asyncio.get_running_loop().time()
        for name in [name for name, at in self._heard.items() if now - at > SILENT_SECONDS]:
            self._drop(name)

    @property
    def _generation(self) -> str:
        return f"{self._epoch}-{self._count}"

    def _note_change(self) -> None:
        self._count += 1
        self._changed.set()


class _Unmoved:
    """Owns the controller's links, which carry calls alone."""

    def on_entries(self, link: Link, entries: list[Entry]) -> None: ...
    def on_status(self, link: Link) -> None: ...
    def on_leaving(self, link: Link) -> None: ...
    def on_lost(self, link: Link) -> None: ...


def _noted(journal: FleetJournal, method: str, args: dict[str, Any]) -> FleetJournal:
    """Return the journal with what a replica that joins later has to do as well."""
    match method:
        case "pause":
            return replace(journal, paused=args["mode"])
        case "resume":
            return replace(journal, paused=None)
        case "release_memory":
            return replace(journal, released=tuple(sorted({*journal.released, *args["tags"]})))
        case "restore_memory":
            return replace(journal, released=tuple(sorted({*journal.released} - {*args["tags"]})))
    return journal


def _slowest(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one report for all: the same weights, the longest durations, everything that was aborted."""
    durations = ("prepare_duration", "drain_duration", "pause_duration")
    longest = {name: max(report[name] for report in reports) for name in durations}
    return {**reports[0], **longest, "num_aborted": sum(report["num_aborted"] for report in reports)}
