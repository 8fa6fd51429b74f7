"""`myserve serve --replicas 2` on a real Ray: what dies or hangs takes no byte with it, and nothing is left running."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from benchmarks.fleet.requests import Told, ask, requests
from benchmarks.fleet.serving import MODEL, Serving, is_well, replicas_of
from cluster.on_ray.conftest import THREADS, told_by
from myserve.embedded import embedded_model_path


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "step-1").mkdir()
    for file in embedded_model_path().glob("*.safetensors"):
        (folder / "step-1" / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def fleet(weights_dir: Path) -> Iterator[Serving]:
    serving = Serving(
        "--replicas", "2", "--replica-cpus", "0.5", "--weights-dir", str(weights_dir), **THREADS
    )
    yield serving
    # in order, or Ray's processes would stay: the last test has done so already
    serving.stop()


async def is_whole(fleet: Serving) -> None:
    async with aiohttp.ClientSession() as session:
        await is_well(session, fleet, 2)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", ["kill", "suspend"])
def test_a_replica_that_dies_or_hangs_in_mid_stream_takes_no_byte_with_it(
    fleet: Serving, want: list[Told], fault: str
) -> None:
    asyncio.run(is_whole(fleet))
    replica = fleet.processes("FleetReplica")[0]
    try:
        assert asyncio.run(told_by(fleet.url, getattr(replica, fault))) == want
    finally:
        if fault == "suspend":
            replica.resume()


async def update(session: aiohttp.ClientSession, fleet: Serving, **body: Any) -> tuple[int, Any]:
    body = {"path": "step-1", "mode": "keep"} | body
    async with session.post(fleet.url + "/v1/weights", json=body) as response:
        return response.status, await response.json()


@pytest.mark.timeout(120)
def test_new_weights_reach_the_fleet_and_the_replica_that_came_back(fleet: Serving) -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            await is_well(session, fleet, 2)
            status, report = await update(session, fleet)
            assert (status, report.get("weight_version")) == (200, 1), report
            assert (await update(session, fleet, path="../step-1"))[0] == 400
            answers = [await ask(session, fleet.url, requests(MODEL, 1)[1]) for _ in range(2)]
            assert {version for told in answers for version in told.weight_versions} == {1}

    asyncio.run(run())


@pytest.mark.timeout(120)
def test_another_controller_goes_on_from_the_versions_of_the_one_that_was_killed(fleet: Serving) -> None:
    """It is killed while the fleet waits for its streams to end: whatever was decided is so everywhere."""

    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            await is_well(session, fleet, 2)
            long = [request for request in requests(MODEL, 3, max_tokens=400) if "echoed" in request.name]
            streams = [asyncio.ensure_future(ask(session, fleet.url, long[0])) for _ in range(8)]
            updating = asyncio.ensure_future(update(session, fleet, mode="drain"))
            await asyncio.sleep(0.5)
            for controller in fleet.processes("FleetController"):
                controller.kill()
            status, report = await updating
            assert {told.status for told in await asyncio.gather(*streams)} == {200}
            version = report["weight_version"] if status == 200 else 1
            assert version == (2 if status == 200 else 1), report
            assert (await update(session, fleet))[1]["weight_version"] == version + 1
            while {r["weight_version"] for r in await replicas_of(session, fleet)} != {version + 1}:
                await asyncio.sleep(0.1)

    asyncio.run(run())


@pytest.mark.timeout(120)
def test_metrics_and_status_name_each_replica(fleet: Serving) -> None:
    async def read() -> tuple[str, dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            # one that came in between would be in the second answer alone
            await is_well(session, fleet, 2)
            async with session.get(fleet.url + "/metrics") as response:
                metrics = await response.text()
            async with session.get(fleet.url + "/version") as response:
                return metrics, await response.json()

    metrics, version = asyncio.run(read())
    replicas = version["replicas"][MODEL]
    assert len({replica["class"] for replica in replicas}) == 1
    for replica in replicas:
        labels = f'model_name="{MODEL}",replica="{replica["name"]}"'
        assert f"vllm:num_requests_running{{{labels}}}" in metrics
        assert f"myserve:routed_hit_tokens_total{{{labels}}} {float(replica['hit_tokens'])}" in metrics
    assert sum(sum(replica["requests"].values()) for replica in replicas) > 0
    table = subprocess.run(
        [sys.executable, "-m", "myserve", "status", fleet.url], capture_output=True, text=True, check=True
    ).stdout
    assert all(replica["name"] in table and replica["class"] in table for replica in replicas)


def test_the_replicas_of_a_ray_of_our_own_listen_on_loopback_alone(fleet: Serving) -> None:
    """Ray's own port of the same process listens elsewhere."""
    asyncio.run(is_whole(fleet))
    for replica in fleet.processes("FleetReplica"):
        listening = [c.laddr.ip for c in replica.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert "127.0.0.1" in listening, listening


def nothing_is_left(children: list[psutil.Process]) -> bool:
    return psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.timeout(60)
def test_nothing_is_left_running_after_ctrl_c(fleet: Serving) -> None:
    children = psutil.Process(fleet.process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in children)
    assert fleet.stop() == 0, fleet.said
    assert nothing_is_left(children)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("process", ["raylet", "FleetReplica"])
def test_nothing_is_left_running_of_a_start_that_was_ended(number: signal.Signals, process: str) -> None:
    """While Ray starts, and while the replicas load their model."""
    serving = Serving("--replicas", "2", "--replica-cpus", "0.5", **THREADS)
    while not serving.processes(process):
        assert serving.process.poll() is None, serving.said
    children = psutil.Process(serving.process.pid).children(recursive=True)
    assert serving.stop(number) == 0, serving.said
    assert nothing_is_left(children)
