"""What compiled code is kept under must change with every source that it is made of."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myserve.core.compiled import draw_kernel, entry_points
from myserve.core.compiled.fingerprint import fingerprint

COMPILED = Path(draw_kernel.__file__).parent
CORE = COMPILED.parent


def imported(file: Path) -> set[Path]:
    """The files of `core` that this one imports."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    named = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    named |= {str(node.module) for node in nodes}
    files = {
        CORE.joinpath(*name.split(".")[2:]).with_suffix(".py")
        for name in named
        if name.startswith("myserve.core.")
    }
    return {file for file in files if file.is_file()}


def sources() -> set[Path]:
    return {
        file for each in entry_points.SOURCES for file in ([each] if each.is_file() else each.glob("*.py"))
    }


def test_the_sources_are_all_that_the_kernels_import() -> None:
    reached, new = set[Path](), {Path(draw_kernel.__file__)}
    while new:
        reached |= new
        new = set[Path]().union(*map(imported, new)) - reached
    assert reached <= sources()
    assert {file for file in sources() if file.parent == CORE} <= reached, (
        "of the others, only what is compiled"
    )


@pytest.mark.parametrize(
    "entry",
    [entry_points.normalise_rows, entry_points.mask_rows, entry_points.best_rows, entry_points.draw_rows],
)
def test_an_entry_points_key_holds_its_sources(entry: Callable[[], Any]) -> None:
    cells = [cell.cell_contents for cell in entry().py_func.__closure__ or ()]
    assert fingerprint(*entry_points.SOURCES) in cells


def test_any_change_changes_the_fingerprint(tmp_path: Path) -> None:
    files = sorted(sources())
    for number, changed in enumerate(files):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in files:
            (folder / file.name).write_text(file.read_text() + ("# changed\n" if file == changed else ""))
        assert fingerprint(folder) != fingerprint(*files)
    assert fingerprint(*files) == fingerprint(*files), "the control: the same files"
