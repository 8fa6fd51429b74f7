"""Weights as one transaction: each failure leaves a fleet of one version, or names those that are not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.stores import Store
from myserve.cluster.controller import Controller
from myserve.cluster.journal import Adapter, FleetJournal, FleetWeights
from myserve.cluster.messages import Member
from myserve.errors import BadSnapshotError, EngineDeadError, EngineError, RequestError

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myserve.cluster.controller.SETTLE_SECONDS", 0.0)


class Replica:
    """A replica's side of a transaction, which fails where it is told to."""

    def __init__(self, name: str, fails: str = "", error: Exception | None = None) -> None:
        self.name, self.fails, self.error = name, fails, error
        self.version = 0
        self.held: dict[str, int] = {}
        self.calls: list[str] = []
        self.waits: asyncio.Event | None = None

    @property
    def member(self) -> Member:
        return Member(self.name, "host", 1, "bits", self.version)

    async def call(self, method: str, **args: Any) -> Any:
        self.calls.append(method)
        if self.waits is not None:
            await self.waits.wait()
        if method == self.fails:
            raise self.error or EngineError("broken")
        match method:
            case "prepare_weights":
                self.held[args["transaction"]] = args["change"].weight_version
            case "withdraw_weights":
                self.held.pop(args["transaction"])
            case "swap_weights":
                self.version = self.held.pop(args["transaction"])
                durations = dict.fromkeys(("prepare_duration", "drain_duration", "pause_duration"), 0.5)
                return {"weight_version": self.version, "checksum": "sum", "num_aborted": 1, **durations}
        return None

    def close(self) -> None:
        self.held.clear()  # as a replica does whose caller is gone


async def fleet_of(*replicas: Replica, store: Store | None = None) -> Controller:
    by_name = {replica.name: replica for replica in replicas}

    async def connect(member: Member) -> Replica:
        return by_name[member.name]

    controller = Controller("secret", store, connect)
    for replica in replicas:
        await controller.heartbeat(replica.member)
    return controller


def names(controller: Controller) -> Callable[[], Awaitable[list[str]]]:
    async def names() -> list[str]:
        return sorted(member.name for member in (await controller.members("")).members)

    return names


async def test_all_prepare_before_any_swaps_and_then_it_is_published() -> None:
    one, two = Replica("one"), Replica("two")
    controller = await fleet_of(one, two)
    report = await controller.update_weights("t", folder="/w/1")
    assert (one.version, two.version, controller.journal.weight_version) == (1, 1, 1)
    assert one.calls == ["prepare_weights", "swap_weights"]
    assert (report["num_aborted"], report["pause_duration"]) == (2, 0.5)
    assert (await controller.members("")).weight_version == 1


async def test_none_swaps_while_one_still_prepares() -> None:
    one, two = Replica("one"), Replica("two")
    two.waits = asyncio.Event()
    controller = await fleet_of(one, two)
    updating = asyncio.ensure_future(controller.update_weights("t", folder="/w/1"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert (one.calls, controller.journal.phase) == (["prepare_weights"], "prepare")
    two.waits.set()
    await updating
    assert (one.version, two.version) == (1, 1)


async def test_one_that_refuses_stops_it_everywhere() -> None:
    one, two = Replica("one"), Replica("two", "prepare_weights", BadSnapshotError("not this model's"))
    controller = await fleet_of(one, two)
    with pytest.raises(BadSnapshotError):
        await controller.update_weights("t", folder="/w/1")
    assert (one.version, two.version, one.held, controller.journal) == (0, 0, {}, FleetJournal())
    assert one.calls == ["prepare_weights", "withdraw_weights"]
    assert await names(controller)() == ["one", "two"]


async def test_one_that_dies_does_not_stop_the_others() -> None:
    one, two = Replica("one"), Replica("two", "prepare_weights", EngineDeadError("gone"))
    controller = await fleet_of(one, two)
    await controller.update_weights("t", folder="/w/1")
    assert (one.version, await names(controller)()) == (1, ["one"])


async def test_one_that_fails_to_swap_leaves_and_the_fleet_is_of_one_version() -> None:
    one, two = Replica("one"), Replica("two", "swap_weights")
    controller = await fleet_of(one, two)
    await controller.update_weights("t", folder="/w/1")
    assert await names(controller)() == ["one"]
    assert (await controller.heartbeat(two.member)).is_expelled
    assert (await controller.members("")).outside == {"two"}


async def test_a_newcomer_is_no_member_before_it_has_the_published_version() -> None:
    controller = await fleet_of(Replica("one"))
    await controller.update_weights("t", folder="/w/1")
    new = Replica("new")
    standing = await controller.heartbeat(new.member)
    assert not standing.is_member
    assert [change.folder for change in standing.missing] == ["/w/1"]  # type: ignore[union-attr]
    assert standing.missing[0].checksum == "sum"  # type: ignore[union-attr]
    new.version = 1
    assert (await controller.heartbeat(new.member)).is_member


async def test_a_newcomer_waits_for_the_end_of_a_transaction() -> None:
    one, new = Replica("one"), Replica("new")
    one.waits = asyncio.Event()
    controller = await fleet_of(one)
    updating = asyncio.ensure_future(controller.update_weights("t", folder="/w/1"))
    await asyncio.sleep(0)
    assert not (await controller.heartbeat(new.member)).is_member
    assert (await controller.heartbeat(one.member)).is_member
    one.waits.set()
    await updating
    assert (await controller.heartbeat(new.member)).missing


@pytest.mark.parametrize("phase", ["prepare", "swap"])
async def test_a_controller_that_died_left_its_decision(phase: Any) -> None:
    """Before the decision nothing was changed; after it, who has not swapped is behind and off the list."""
    pending = FleetWeights("/w/1", 1)
    store = Store(FleetJournal(pending=pending, phase=phase))
    swapped, behind = Replica("swapped"), Replica("behind")
    swapped.version = 1 if phase == "swap" else 0
    controller = await fleet_of(swapped, behind, store=store)
    assert await names(controller)() == (["swapped"] if phase == "swap" else ["behind", "swapped"])
    assert (await controller.members("")).outside == ({"behind"} if phase == "swap" else set())
    assert FleetJournal.read(store) == (FleetJournal((pending,)) if phase == "swap" else FleetJournal())
    behind.version = 1
    await controller.heartbeat(behind.member)
    assert (await controller.members("")).outside == set()


async def test_the_decision_is_kept_before_the_first_swap() -> None:
    seen, store = [], Store()

    class Watching(Replica):
        async def call(self, method: str, **args: Any) -> Any:
            seen.append((method, FleetJournal.read(store).phase))
            return await super().call(method, **args)

    controller = await fleet_of(Watching("one"), store=store)
    await controller.update_weights("t", folder="/w/1")
    assert seen == [("prepare_weights", "prepare"), ("swap_weights", "swap")]


async def test_a_version_is_never_used_again() -> None:
    controller = await fleet_of(Replica("one"))
    await controller.update_weights("t", folder="/w/5", version=5)
    with pytest.raises(RequestError, match="must grow"):
        await controller.update_weights("u", folder="/w/6", version=5)


async def test_a_call_that_a_transaction_has_overtaken_is_no_step_back() -> None:
    one = Replica("one")
    controller = await fleet_of(one)
    said_before = one.member
    await controller.update_weights("t", folder="/w/1")
    await controller.change_adapter(Adapter("a", "/l/a"))
    standing = await controller.heartbeat(said_before)
    assert (standing.is_member, standing.missing) == (True, ())
    members = await controller.members("")
    (member,) = members.members
    assert (member.weight_version, member.num_adapter_changes, members.checksum) == (1, 1, "sum")


async def test_one_that_leaves_while_the_others_swap_is_no_failure() -> None:
    one, two = Replica("one"), Replica("two")
    controller = await fleet_of(one, two)
    one.waits = asyncio.Event()
    updating = asyncio.ensure_future(controller.update_weights("t", folder="/w/1"))
    await asyncio.sleep(0)
    await controller.leave("two")
    one.waits.set()
    assert (await updating)["weight_version"] == 1
    assert await names(controller)() == ["one"]


async def test_a_pause_is_the_newcomers_too() -> None:
    controller = await fleet_of(Replica("one"))
    await controller.everywhere("pause", mode="keep")
    assert (await controller.heartbeat(Replica("new").member)).paused == "keep"
    await controller.everywhere("resume")
    assert (await controller.heartbeat(Replica("newer").member)).paused is None


async def test_no_replica_is_left() -> None:
    controller = await fleet_of()
    with pytest.raises(EngineDeadError):
        await controller.update_weights("t", folder="/w/1")
