"""On a Ray that runs already: `RAY_ADDRESS`, `serve run` with the config file of `deploy/`, and its files."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml

from benchmarks.fleet.requests import Told
from benchmarks.fleet.serving import is_well, serving
from cluster.on_ray.conftest import THREADS, told_by

DEPLOY = Path(__file__).parents[3] / "deploy"
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Head:
    """`ray start --head` in a folder and on a port of its own. It asks for a token, as Ray does where one is there."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.token = secrets.token_hex(32)
        # short: sockets' names have a limit
        self._folder = tempfile.mkdtemp(prefix="ray")
        options = {
            "port": self.address.rpartition(":")[2],
            "node-ip-address": "127.0.0.1",
            "num-cpus": "2",
            "include-dashboard": "false",
            "object-store-memory": str(128 << 20),
            "temp-dir": self._folder,
        }
        command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats"]
        self.process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env={
                **os.environ,
                **THREADS,
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self.token,
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "Ray runtime started" in line:
                return
        raise RuntimeError("ray start has ended")

    def names(self) -> str:
        """The command lines of everything that runs on it."""
        lines = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                lines.append(" ".join(child.cmdline()))
        return "\n".join(lines)

    def stop(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        psutil.wait_procs(children, timeout=20)
        self.process.kill()
        # closes the pipe, and takes the exit status
        self.process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    head = Head()
    yield head
    head.stop()


@pytest.mark.timeout(120)
def test_ray_address_is_honoured_and_the_cluster_is_left_as_it_was(head: Head, want: list[Told]) -> None:
    with serving("--replicas", "1", RAY_ADDRESS=head.address, RAY_AUTH_TOKEN=head.token, **THREADS) as server:

        async def run() -> list[Told]:
            async with aiohttp.ClientSession() as session:
                await is_well(session, server, 1)
            assert "FleetReplica" in head.names() and not server.processes("raylet")
            return await told_by(server.url)

        assert asyncio.run(run()) == want
    assert server.process.returncode == 0
    assert not {name for name in ("FleetReplica", "ServeController") if name in head.names()}
    with serving("--replicas", "3", RAY_ADDRESS=head.address, RAY_AUTH_TOKEN=head.token) as greedy:
        assert greedy.process.wait(60) == 1
        assert "3 replicas ask for 3 CPUs, and there are 2" in " ".join(greedy.said.split())


@pytest.mark.timeout(120)
def test_the_config_file_of_deploy_serves_the_same_bytes(
    head: Head, want: list[Told], tmp_path: Path
) -> None:
    config = yaml.safe_load((DEPLOY / "fleet.yml").read_text())
    config["http_options"]["port"] = port = free_port()
    # a small machine's two cores: half of one for each, and one for the ingress
    (app,) = config["applications"]
    app["args"] |= {"replica-cpus": 0.5, "tool-style": "hermes"}
    file = tmp_path / "fleet.yml"
    file.write_text(yaml.safe_dump(config))
    log = (tmp_path / "log").open("w")
    running = subprocess.Popen(
        [BIN / "serve", "run", str(file)],
        env={
            **os.environ,
            "RAY_ADDRESS": head.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": head.token,
            "MYSERVE_MODEL": "",
        },
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"

    async def run() -> list[Told]:
        async with aiohttp.ClientSession() as session:
            while True:
                assert running.poll() is None, (tmp_path / "log").read_text()
                with suppress(aiohttp.ClientError):
                    async with session.get(url + "/health") as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.2)
        return await told_by(url)

    try:
        assert asyncio.run(run()) == want
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(60)
        log.close()


def serve_configs() -> list[Mapping[str, Any]]:
    rays = next(yaml.safe_load_all((DEPLOY / "kuberay.yml").read_text()))
    assert (rays["apiVersion"], rays["kind"]) == ("ray.io/v1", "RayService")
    return [
        yaml.safe_load((DEPLOY / "fleet.yml").read_text()),
        yaml.safe_load(rays["spec"]["serveConfigV2"]),
    ]


@pytest.mark.parametrize("config", serve_configs(), ids=["fleet.yml", "kuberay.yml"])
def test_the_files_of_deploy_are_what_serve_reads_and_their_arguments_are_ours(config: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    from myserve.server.settings import Settings

    (app,) = ServeDeploySchema.model_validate(config).applications
    module, _, name = app.import_path.partition(":")
    assert (module, name, app.route_prefix) == ("myserve.cluster", "app", "/")
    Settings.read({key.replace("-", "_"): value for key, value in app.args.items()})


def test_the_manifest_places_every_replica_that_it_may_ask_for() -> None:
    rays, policy = yaml.safe_load_all((DEPLOY / "kuberay.yml").read_text())
    cluster = rays["spec"]["rayClusterConfig"]
    args = serve_configs()[1]["applications"][0]["args"]
    (workers,) = cluster["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) >= args["replica-cpus"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (args["replicas"], args["max-replicas"])
    mounts = {mount["name"] for mount in workers["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in workers["template"]["spec"]["volumes"]}
    assert policy["kind"] == "NetworkPolicy"
