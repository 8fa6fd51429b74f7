"""A run has a folder of its own: never another's, and one that is gone on with is the same run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

MAY_CHANGE = ("run", "resume", "steps", "url", "weights_dir")  # none of them changes a step's numbers


class RunError(ValueError):
    """The user's to mend: what was asked for does not fit what is in the folder."""


def new_folder(run: Path, config: Mapping[str, Any]) -> Path:
    """Return `run`, or where that exists `run`-2, `run`-3, ...: an earlier run is never overwritten."""
    for folder in _names(run):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder
    raise AssertionError("the names do not end")


def folder_to_resume(run: Path, config: Mapping[str, Any]) -> Path:
    """Return the latest of `run`, `run`-2, ...; raises RunError if there is none, or if it was another run."""
    latest = None
    for folder in _names(run):
        if not folder.exists():
            break
        latest = folder
    if latest is None or not (latest / "config.json").exists():
        raise RunError(f"there is no run in {run} to go on with: start it without --resume")
    before = json.loads((latest / "config.json").read_text())
    changed = [name for name in config if name not in MAY_CHANGE and config[name] != before.get(name)]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in changed)
        raise RunError(f"the run in {latest} had {options}: go on with the same, or start a new one")
    return latest


def _names(run: Path) -> Iterator[Path]:
    yield run
    for number in count(2):
        yield run.with_name(f"{run.name}-{number}")
