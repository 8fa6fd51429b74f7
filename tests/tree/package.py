"""The package as the tests of the tree see it: its modules, their folders, their syntax trees. Imports none of them."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "myserve"


@cache
def modules() -> dict[str, Path]:
    """Return every module's dotted name below `myserve` and its file, packages' `__init__.py` left out."""
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of one file."""
    return ast.parse(path.read_text())


@cache
def contracts() -> list[dict[str, Any]]:
    """Return the import-linter contracts of pyproject.toml."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return pyproject["tool"]["importlinter"]["contracts"]  # type: ignore[no-any-return]


def layers(container: str) -> list[set[str]]:
    """Return the layers that the contracts give one package, from the top down."""
    for contract in contracts():
        if contract["type"] == "layers" and contract["containers"] == [container]:
            return [{name.strip() for name in layer.split("|")} for layer in contract["layers"]]
    raise AssertionError(f"no layers contract for {container}")
