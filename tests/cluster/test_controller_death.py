"""A controller that dies at any moment of a transaction leaves a fleet of one version, and the next one goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.conftest import SmallFleet
from cluster.stores import ControllerDiedError
from myserve.core.params import SamplingParams
from myserve.errors import EngineError
from runs import Asked, run

# the phases as the journal has them, one after the other; "idle" is what publishes
MOMENTS = [(phase, when) for phase in ("prepare", "swap", "idle") for when in ("before", "after")]


@pytest.fixture(autouse=True)
def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas call three times a second here, and who waits for a change asks again each second."""
    monkeypatch.setattr("myserve.cluster.controller.WATCH_SECONDS", 1.0)
    monkeypatch.setattr("myserve.cluster.controller.SETTLE_SECONDS", 0.8)


def dies_at(phase: str, when: str) -> Callable[[bytes, str], None]:
    """Return a fault that ends the controller at a write, and every write of its last breath."""
    is_dead = False

    def fault(body: bytes, now: str) -> None:
        nonlocal is_dead
        is_dead = is_dead or (json.loads(body)["phase"] == phase and now == when)
        if is_dead:
            raise ControllerDiedError

    return fault


def wait_until_all_are_of(fleet: SmallFleet, version: int) -> None:
    while {server.engine.weight_version for server in fleet.replicas.values()} != {version}:
        time.sleep(0.02)
    while fleet.engine.fleet.members.outside or len(fleet.engine.fleet._usable()) < len(fleet.replicas):
        time.sleep(0.02)


def updated(fleet: SmallFleet, folder: Path, is_decided: bool) -> None:
    """Update while the controller dies, and check what it leaves; then update again."""
    before = fleet.engine.weight_version
    update = fleet.engine.update_weights(folder, mode="keep")
    if is_decided:
        assert update.result(60).weight_version == before + 1
    else:
        with pytest.raises(EngineError, match=f"still version {before}; send them again"):
            update.result(60)
    version = before + is_decided
    wait_until_all_are_of(fleet, version)
    assert fleet.engine.weight_version == version
    (answer,) = run(fleet.engine, [Asked(list(range(30, 50)), SamplingParams(max_tokens=4, seed=1))])
    assert {token.weight_version for delta in answer[0].deltas for token in delta.tokens} == {version}
    assert fleet.engine.update_weights(folder, mode="keep").result(60).weight_version == version + 1


@pytest.mark.parametrize(("phase", "when"), MOMENTS)
def test_a_controller_that_dies_at_a_write(
    small_fleet: SmallFleet, tiny_model: Callable[[str], Path], phase: str, when: str
) -> None:
    small_fleet.store.fault = dies_at(phase, when)
    is_decided = MOMENTS.index((phase, when)) >= MOMENTS.index(("swap", "after"))
    updated(small_fleet, tiny_model("llama"), is_decided)


@pytest.mark.parametrize("method", ["prepare_weights", "swap_weights"])
def test_a_controller_that_dies_when_one_of_two_has_done_it(
    small_fleet: SmallFleet,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    dying, each = small_fleet.controller, small_fleet.controller._on_each

    async def on_one(peers: dict[str, Any], called: str, **args: Any) -> dict[str, Any]:
        if called != method:
            return await each(peers, called, **args)
        first = min(peers)
        await each({first: peers[first]}, called, **args)
        small_fleet.store.fault = dies_at("idle", "before")
        raise ControllerDiedError

    monkeypatch.setattr(dying, "_on_each", on_one)
    updated(small_fleet, tiny_model("llama"), method == "swap_weights")


def test_control_without_what_was_written_the_next_one_knows_no_version(
    small_fleet: SmallFleet, tiny_model: Callable[[str], Path]
) -> None:
    dies = dies_at("swap", "before")

    def forgets(body: bytes, when: str) -> None:
        try:
            dies(body, when)
        except ControllerDiedError:
            small_fleet.store.body = None
            raise

    small_fleet.store.fault = forgets
    with pytest.raises(AssertionError):
        updated(small_fleet, tiny_model("llama"), is_decided=False)
