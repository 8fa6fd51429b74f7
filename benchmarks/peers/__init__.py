"""The peers that ours is measured beside, each in a folder of its own under `.bench/`, installed by one step:

python -m benchmarks.peers openvino
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

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

    @property
    def is_installed(self) -> bool:
        return (self.folder / "installed").exists()

    def install_into_folder(self, model: Path) -> None:
        """Installs it; a step that was interrupted is done again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.install(self.folder, model)
        (self.folder / "installed").touch()


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
