"""`myserve serve --replicas 2` on a real Ray: a killed replica takes no byte with it, and nothing is left running."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from benchmarks.fleet.requests import Told, ask, requests
from myserve.embedded import embedded_model_path

MODEL = "myserve-demo"
ENV = {**os.environ, "MYSERVE_TOOL_STYLE": "hermes", "MYSERVE_THREADS": "1", "MYSERVE_MODEL": ""}


class Serving:
    """A server of the command line, in a process of its own."""

    def __init__(self, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "myserve", "serve", "--port", str(port), *options], env=ENV
        )

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of its replicas: children of the Ray that it has started."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for child in children:
            with suppress(psutil.Error):
                if "FleetReplica" in " ".join(child.cmdline()):
                    found.append(child)
        return found


async def healthy(session: aiohttp.ClientSession, serving: Serving) -> None:
    while True:
        assert serving.process.poll() is None, "the server ended before it was ready"
        try:
            async with session.get(serving.url + "/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "step-1").mkdir()
    for file in embedded_model_path().glob("*.safetensors"):
        (folder / "step-1" / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def fleet(weights_dir: Path) -> Iterator[Serving]:
    serving = Serving("--replicas", "2", "--replica-cpus", "0.5", "--weights-dir", str(weights_dir))
    yield serving
    # in order, or Ray's processes would stay: the last test has done so already
    serving.process.send_signal(signal.SIGINT)
    serving.process.wait(60)


@pytest.fixture(scope="module")
def alone() -> Iterator[Serving]:
    serving = Serving()
    yield serving
    serving.process.send_signal(signal.SIGTERM)
    serving.process.wait()


async def replicas_of(session: aiohttp.ClientSession, serving: Serving) -> list[Any]:
    """Return what `/version` says of each replica."""
    async with session.get(serving.url + "/version") as response:
        return (await response.json())["replicas"][MODEL]


async def told_by(serving: Serving, *, kills: bool = False) -> list[Told]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=100)) as session:
        await healthy(session, serving)
        while kills and len(await replicas_of(session, serving)) < 2:
            await asyncio.sleep(0.2)
        asked = [request for seed in (1, 2) for request in requests(MODEL, seed)]
        answers = [asyncio.ensure_future(ask(session, serving.url, request)) for request in asked]
        if kills:
            await asyncio.sleep(0.3)
            os.kill(serving.replicas()[0].pid, signal.SIGKILL)
        return list(await asyncio.gather(*answers))


@pytest.mark.timeout(240)
def test_a_replica_killed_in_mid_stream_takes_no_byte_with_it(fleet: Serving, alone: Serving) -> None:
    want = asyncio.run(told_by(alone))
    assert {told.status for told in want} == {200}
    assert asyncio.run(told_by(fleet, kills=True)) == want


@pytest.mark.timeout(120)
def test_new_weights_reach_the_fleet_and_the_replica_that_came_back(fleet: Serving) -> None:
    async def update() -> None:
        async with aiohttp.ClientSession() as session:
            body = {"path": "step-1", "mode": "keep"}
            async with session.post(fleet.url + "/v1/weights", json=body) as response:
                report = await response.json()
                assert (response.status, report.get("weight_version")) == (200, 1), report
            body = {"path": "../step-1"}
            async with session.post(fleet.url + "/v1/weights", json=body) as response:
                assert response.status == 400
            answers = [await ask(session, fleet.url, requests(MODEL, 1)[1]) for _ in range(2)]
            assert {version for told in answers for version in told.weight_versions} == {1}

    asyncio.run(update())


@pytest.mark.timeout(120)
def test_metrics_and_status_name_each_replica(fleet: Serving) -> None:
    async def read() -> tuple[str, dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            # one that came in between would be in the second answer alone
            while len(await replicas_of(session, fleet)) < 2:
                await asyncio.sleep(0.2)
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


@pytest.mark.timeout(60)
def test_nothing_is_left_running_after_ctrl_c(fleet: Serving) -> None:
    children = psutil.Process(fleet.process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in children)
    fleet.process.send_signal(signal.SIGINT)
    assert fleet.process.wait(40) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def said_by(*options: str, **variables: str) -> tuple[int, str]:
    ran = subprocess.run(
        [sys.executable, "-m", "myserve", "serve", "--port", "0", *options],
        env=ENV | variables,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return ran.returncode, " ".join(ran.stderr.split())


def test_more_replicas_than_cores_are_refused_at_once() -> None:
    code, said = said_by("--replicas", "4000")
    assert code == 1 and "4000 replicas ask for 4000 CPUs" in said and "--replica-cpus" in said


def test_several_models_are_refused() -> None:
    code, said = said_by("--replicas", "2", MYSERVE_MODEL="a=/x,b=/y")
    assert code == 1 and "a fleet serves one model" in said
