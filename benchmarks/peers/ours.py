"""myserve itself: without drafts, as any user starts it, in int8, and with exactness off.

Without drafts, for the weights here are random and greedy completions run in circles, which n-grams guess nearly all:
figures with them would say nothing of a real text. `benchmarks.speculation` measures drafts, on a real model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.peers import Launch, Peer

WITHOUT_DRAFTS = {"MYSERVE_SPECULATION": "off"}


def _nothing_to_install(folder: Path, model: Path) -> None:
    """Do nothing: it runs from this environment."""


def launch_drafting(folder: Path, model: Path, port: int) -> Launch:
    command = [sys.executable, "-m", "myserve", "serve", str(model), "--served-model-name", str(model)]
    return Launch([*command, "--port", str(port)])


def launch(folder: Path, model: Path, port: int) -> Launch:
    return Launch(launch_drafting(folder, model, port).command, WITHOUT_DRAFTS)


def launch_int8(folder: Path, model: Path, port: int) -> Launch:
    own = launch(folder, model, port)
    return Launch([*own.command, "--quantize", "int8"], own.env)


def launch_inexact(folder: Path, model: Path, port: int) -> Launch:
    exact = launch(folder, model, port)
    return Launch([*exact.command, "--exact", "off"], exact.env)


def of_tree(tree: Path) -> Peer:
    """Return ours as another checkout of this repository has it, in this environment: what a change is held against."""

    def launch_there(folder: Path, model: Path, port: int) -> Launch:
        env = WITHOUT_DRAFTS | {"PYTHONPATH": str(tree / "src")}
        return Launch(launch(folder, model, port).command, env)

    return Peer(f"ours-{tree.name}", _nothing_to_install, launch_there)


PEER = Peer("ours", _nothing_to_install, launch)
DRAFTING = Peer("ours-drafting", _nothing_to_install, launch_drafting)
INT8 = Peer("ours-int8", _nothing_to_install, launch_int8)
INEXACT = Peer("ours-exact-off", _nothing_to_install, launch_inexact)
