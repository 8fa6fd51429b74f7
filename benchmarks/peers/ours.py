"""myserve itself, started as any user starts it; and once with exactness off, to see what exactness costs."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.peers import Launch, Peer


def _nothing_to_install(folder: Path, model: Path) -> None:
    """Do nothing: it runs from this environment."""


def launch(folder: Path, model: Path, port: int) -> Launch:
    command = [sys.executable, "-m", "myserve", "serve", str(model), "--served-model-name", str(model)]
    return Launch([*command, "--port", str(port)])


def launch_inexact(folder: Path, model: Path, port: int) -> Launch:
    exact = launch(folder, model, port)
    return Launch([*exact.command, "--exact", "off"], exact.env)


PEER = Peer("ours", _nothing_to_install, launch)
INEXACT = Peer("ours-exact-off", _nothing_to_install, launch_inexact)
