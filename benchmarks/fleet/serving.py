"""A server of the command line in a process of its own, and the processes of its fleet."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil

__all__ = ["MODEL", "Serving", "is_well", "replicas_of", "serving"]

MODEL = "myserve-demo"


class Serving:
    """`myserve serve` of the embedded model on a free port; `variables` are added to the environment."""

    def __init__(self, *options: str, **variables: str) -> None:
        # output to a file: a pipe that nobody reads would stop the server
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115  # until it is stopped
        self.process = subprocess.Popen(
            [sys.executable, "-m", "myserve", "serve", "--port", "0", "--tool-style", "hermes", *options],
            env={**os.environ, "MYSERVE_MODEL": "", **variables},
            stderr=self._log,
            stdout=self._log,
        )
        self._last_words = ""

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self._last_words or Path(self._log.name).read_text()

    @property
    def url(self) -> str:
        """Where it listens; waits until it has said so. Raises RuntimeError where it has ended."""
        while (found := re.search(r"http://[\d.:]+", self.said)) is None:
            if self.process.poll() is not None:
                raise RuntimeError(self.said)
            time.sleep(0.1)
        return found[0]

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the living processes of a deployment: FleetReplica, or FleetController."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if name in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it in order; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        if not self._log.closed:
            self._last_words = self.said or "nothing"
            self._log.close()
        return status


@contextmanager
def serving(*options: str, **variables: str) -> Iterator[Serving]:
    """Serve for the length of a block."""
    server = Serving(*options, **variables)
    try:
        yield server
    finally:
        server.stop()


async def is_well(session: aiohttp.ClientSession, server: Serving, replicas: int = 0) -> None:
    """Wait until it answers and, of a fleet, until so many replicas take requests. Raises RuntimeError."""
    while True:
        if server.process.poll() is not None:
            raise RuntimeError(server.said)
        with suppress(aiohttp.ClientError):
            async with session.get(server.url + "/health") as response:
                if response.status == 200 and (
                    not replicas or len(await replicas_of(session, server)) >= replicas
                ):
                    return
        await asyncio.sleep(0.2)


async def replicas_of(session: aiohttp.ClientSession, server: Serving) -> list[Any]:
    """Return what `/version` says of each replica that takes requests."""
    async with session.get(server.url + "/version") as response:
        found = (await response.json())["replicas"][MODEL]
    return [replica for replica in found if replica["state"] == "ready"]
