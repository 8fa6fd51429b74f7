"""The embedded model: where it lies. Nothing is loaded here, and torch is not imported."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["embedded_model_path"]


def embedded_model_path() -> Path:
    """Return the folder of the small chat model that ships inside the package, in the hub's own file format.

    >>> sorted(path.suffix for path in embedded_model_path().iterdir() if path.stem == "model")
    ['.safetensors']
    """
    # Path(str(...)) and not as_file(): a loader needs a folder that outlives a `with`. Wheels are unpacked
    # when installed, so the resource is a real folder.
    return Path(str(files(__package__) / "model"))
