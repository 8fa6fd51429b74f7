"""Tests mirror the tree: each module has a test of its name, or a line in tests/README.md where it is proved."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tree.package import PACKAGE, ROOT, modules

TESTS = ROOT / "tests"
LINES = re.findall(
    r"^\| `([\w/]+\.py)` \| `([\w/]+\.py)` \| (.*) \|$", (TESTS / "README.md").read_text(), re.MULTILINE
)


def has_mirror(path: Path) -> bool:
    """Whether a module has a test of its name in the mirrored folder."""
    place = path.relative_to(PACKAGE)
    return (TESTS / place.parent / f"test_{place.name}").exists()


def imported(test: Path) -> set[str]:
    """Return the dotted names below `myserve` that a test imports, fixtures of its conftests included."""
    files = [test, *(folder / "conftest.py" for folder in test.parents if folder.is_relative_to(TESTS))]
    names = set()
    for file in filter(Path.exists, files):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("myserve"):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return {str(name).removeprefix("myserve.") for name in names}


def test_every_module_has_a_test_of_its_name_or_a_line() -> None:
    told = {module for module, _, _ in LINES}
    places = [path.relative_to(PACKAGE).as_posix() for path in modules().values() if not has_mirror(path)]
    assert sorted(set(places) - told) == []


def test_no_line_is_out_of_date() -> None:
    told = [module for module, _, _ in LINES]
    assert [module for module in told if not (PACKAGE / module).exists()] == []
    assert [module for module in told if has_mirror(PACKAGE / module)] == []
    assert len(told) == len(set(told)) and told == sorted(told)


@pytest.mark.parametrize(("module", "test", "how"), LINES, ids=[module for module, _, _ in LINES])
def test_a_line_is_true(module: str, test: str, how: str) -> None:
    """Either the test imports the module, or both hold each word that the line has in backticks."""
    assert (TESTS / test).exists()
    words = re.findall(r"`([^`]+)`", how)
    name = module.removesuffix(".py").replace("/", ".")
    if not words:
        assert name in imported(TESTS / test), "the test does not import it: name a word that both hold"
    source, proof = (PACKAGE / module).read_text(), (TESTS / test).read_text()
    assert [word for word in words if word not in source or word not in proof] == []
