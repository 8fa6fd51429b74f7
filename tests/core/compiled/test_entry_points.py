"""What compiled code is kept under must change with every source that it is made of."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myserve.core.compiled import draw_kernel, entry_points
from myserve.core.compiled.fingerprint import fingerprint

CORE = Path(draw_kernel.__file__).parent


def imported(file: Path) -> set[str]:
    """The modules of `core` that this one imports."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {
        node.module.rpartition(".")[2] for node in nodes if (node.module or "").startswith("myserve.core.")
    }
    names |= {alias.name for node in nodes if node.module == "myserve.core" for alias in node.names}
    return {f"{name}.py" for name in names}


def test_the_sources_are_all_that_the_kernels_import() -> None:
    reached, new = set[str](), {"kernels.py"}
    while new:
        reached |= new
        new = set().union(*(imported(CORE / name) for name in new)) - reached
    assert reached == set(entry_points.SOURCES)


@pytest.mark.parametrize(
    "entry",
    [entry_points.normalise_rows, entry_points.mask_rows, entry_points.best_rows, entry_points.draw_rows],
)
def test_an_entry_points_key_holds_its_sources(entry: Callable[[], Any]) -> None:
    cells = [cell.cell_contents for cell in entry().py_func.__closure__ or ()]
    assert fingerprint(CORE, *entry_points.SOURCES) in cells


def test_any_change_changes_the_fingerprint(tmp_path: Path) -> None:
    for name in entry_points.SOURCES:
        changed = tmp_path / name
        changed.mkdir()
        for source in entry_points.SOURCES:
            text = (CORE / source).read_text()
            (changed / source).write_text(text + "# changed\n" if source == name else text)
        assert fingerprint(changed, *entry_points.SOURCES) != fingerprint(CORE, *entry_points.SOURCES)
