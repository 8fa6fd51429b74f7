"""A fleet that cannot be is refused with one line and exit status 1, and nothing is left running."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that accepts connections, and is no Ray's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def said_by(*options: str, **variables: str) -> str:
    """Run the command to its end, which is status 1; return what it said, in one line."""
    ran = subprocess.run(
        [sys.executable, "-m", "myserve", "serve", "--port", "0", *options],
        env={**os.environ, "MYSERVE_MODEL": "", **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    return " ".join(ran.stderr.split())


def test_more_replicas_than_cores_are_refused_at_once() -> None:
    said = said_by("--replicas", "4000")
    assert "4000 replicas ask for 4000 CPUs" in said and "--replica-cpus" in said


def test_several_models_are_refused() -> None:
    assert "a fleet serves one model" in said_by("--replicas", "2", MYSERVE_MODEL="a=/x,b=/y")


def test_a_port_that_is_taken_is_told_before_anything_is_started(taken: int) -> None:
    said = said_by("--replicas", "2", "--port", str(taken))
    assert f"cannot listen on 127.0.0.1:{taken}" in said and "starting Ray" not in said


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "no Ray is reached at RAY_ADDRESS=127.0.0.1:1: Connection refused"),
        ("ray://127.0.0.1:10001", "must be host:port"),
        ("somewhere", "must be host:port"),
    ],
)
def test_an_address_where_no_ray_is(address: str, why: str) -> None:
    assert why in said_by("--replicas", "1", RAY_ADDRESS=address)


def test_a_model_that_does_not_load_is_told(tmp_path: Path) -> None:
    said = said_by("--replicas", "1", str(tmp_path))
    assert str(tmp_path) in said
