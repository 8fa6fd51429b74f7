"""The peers that ours is measured beside, each in a folder of its own under `.bench/`, installed by one step:

python -m benchmarks.peers openvino
"""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.model import NAME

ROOT = Path(__file__).parents[2] / ".bench"


@dataclass(frozen=True, slots=True)
class Launch:
    """Hold how a peer is started: the command, and the environment that it has beside ours."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """`launch(folder, model, port)` tells how it is started; `install(folder, model)` is done once, before.

    `prompts` is what it takes; "stdin" means that it is no server, and reads workloads as lines of JSON.
    """

    name: str
    install: Callable[[Path, Path], None]
    launch: Callable[[Path, Path, int], Launch]
    prompts: str = "ids"  # or "text", or "stdin"

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    def is_installed(self, model: Path) -> bool:
        """Return whether it is there, and `model` in its form."""
        return self._mark(model).exists()

    def install_into_folder(self, model: Path) -> None:
        """Install it, and convert `model`; a step that was interrupted is done again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.install(self.folder, model)
        self._mark(model).touch()

    def _mark(self, model: Path) -> Path:
        return self.folder / f"installed{suffix(model)}"


def suffix(model: Path) -> str:
    """Return what a converted model's name ends with: nothing for the model that is made here."""
    return "" if model.name == NAME else f"-{zlib.crc32(str(model.resolve()).encode()):08x}"


def make_venv(folder: Path, *requirements: str, options: tuple[str, ...] = ()) -> Path:
    """Make a virtual environment in `folder` with these installed; return its python."""
    python = folder / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    run(python, "-m", "pip", "install", "--quiet", *options, *requirements)
    return python


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Runs it, shows what it prints, and raises if it fails."""
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)
