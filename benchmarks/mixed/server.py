"""A server in a process of its own, which tells how it ended and what it said last where it ends too soon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp

from myserve.bench.load import BenchError

__all__ = ["Server", "counted", "how_it_ended", "serving"]

START_SECONDS = 600.0
LAST_WORDS = 600  # characters of what it said that are shown


@dataclass
class Server:
    """A running `myserve serve`."""

    url: str
    model: str  # the name that it serves
    version: dict[str, Any]  # of GET /version


@contextmanager
def serving(model: Path | str, options: Sequence[str]) -> Iterator[Server]:
    """Serve `model` in a process of its own, on a free port, with more `options` of `myserve serve`.

    Raises BenchError where it does not start, or ends before the block does: how it ended, and its last words.
    """
    command = [sys.executable, "-m", "myserve", "serve", str(model), "--port", "0", "--log-level", "warning"]
    # its words go to a file: a pipe that nobody reads would stop it, and what it says as it ends would be missed
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [*command, *options],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "400"},
            start_new_session=True,
        ) as process,
    ):
        try:
            url = _url(process, said)
            yield Server(url, _get(url, "/v1/models")["data"][0]["id"], _get(url, "/version"))
        except (
            OSError,
            ValueError,
            aiohttp.ClientError,
        ) as error:  # a connection that broke, or half an answer
            if not _ends_soon(process):
                raise
            raise BenchError(f"the server {how_it_ended(process.returncode)}: {_last_words(said)}") from error
        finally:
            _end(process)


def _ends_soon(process: subprocess.Popen[bytes]) -> bool:
    """Return whether it ended, after a moment: a process that ends breaks its connections before it is gone."""
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def how_it_ended(returncode: int) -> str:
    """Say how a process ended, by its exit status.

    >>> how_it_ended(1), how_it_ended(-9)
    ('ended with status 1', 'was killed by SIGKILL, as the system does where memory ends')
    """
    if returncode >= 0:
        return f"ended with status {returncode}"
    name = signal.Signals(-returncode).name
    return f"was killed by {name}" + ", as the system does where memory ends" * (name == "SIGKILL")


def _words(said: IO[bytes]) -> str:
    return os.pread(said.fileno(), os.fstat(said.fileno()).st_size, 0).decode(errors="replace")


def _last_words(said: IO[bytes]) -> str:
    return " ".join(_words(said).split())[-LAST_WORDS:] or "it said nothing"


def _url(process: subprocess.Popen[bytes], said: IO[bytes]) -> str:
    """Wait until the server has told its address and is ready."""
    url, end = "", time.monotonic() + START_SECONDS
    while process.poll() is None:
        if time.monotonic() > end:
            raise BenchError(f"the server is not ready after {START_SECONDS:.0f} s: {_last_words(said)}")
        words = [word for word in _words(said).split() if word.startswith("http://")]
        url = url or (words[0] if words else "")
        if url and _is_ready(url):
            return url
        time.sleep(0.1)
    raise BenchError(
        f"the server {how_it_ended(process.returncode)} before it was ready: {_last_words(said)}"
    )


def _is_ready(url: str) -> bool:
    try:
        _get(url, "/ready")
    except (OSError, ValueError):
        return False
    return True


def _get(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path, timeout=10) as reply:
        return json.loads(reply.read() or b"null")


def counted(server: Server, metric: str) -> float:
    """Return the sum of a metric over its labels, as GET /metrics has it."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == metric)
