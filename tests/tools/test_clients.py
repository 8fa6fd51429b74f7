"""The clients' environment: made once, and what cannot be had is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import clients


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip was asked to install; nothing is installed."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(clients.subprocess, "run", run)
    monkeypatch.setattr(clients.venv, "create", lambda folder, **_: Path(folder).mkdir(exist_ok=True))
    return asked


def test_an_environment_is_made_again_only_for_another_list(tmp_path: Path, pip: list[list[str]]) -> None:
    wanted = tmp_path / "list.txt"
    wanted.write_text("one==1\n")
    clients.make_environment(tmp_path / "env", wanted)
    assert (pip[0][-1], tuple(pip[1][-2:])) == (str(wanted), clients.ALONE)
    clients.make_environment(tmp_path / "env", wanted)
    assert len(pip) == 2
    wanted.write_text("one==2\n")
    clients.make_environment(tmp_path / "env", wanted)
    assert len(pip) == 4


def test_a_registry_that_cannot_be_reached_is_named_and_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real pip, ours, and a port on which nobody listens."""

    def create(folder: Path, **_: Any) -> None:
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(clients.venv, "create", create)
    wanted = tmp_path / "list.txt"
    wanted.write_text("no-such-package==1\n")
    for _ in range(2):
        with pytest.raises(clients.EnvironmentNotMadeError, match="no-such-package"):
            clients.make_environment(tmp_path / "env", wanted, index_url="http://127.0.0.1:9/")


@pytest.mark.parametrize(("arguments", "status"), [([], 1), (["--optional"], 0)])
def test_what_cannot_be_had_is_said(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> Path:
        raise clients.EnvironmentNotMadeError("no network")

    monkeypatch.setattr(clients, "make_environment", fails)
    assert clients.main(arguments) == status
    assert "THE CLIENTS' TESTS DO NOT RUN" in capsys.readouterr().out


def test_every_version_is_exact() -> None:
    lines = [line for line in clients.LIST.read_text().splitlines() if not line.startswith("#")]
    assert lines and all("==" in line for line in lines)
