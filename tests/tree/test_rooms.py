"""The plan holds: docs/architecture.md tells the contracts, folders stay small, a name means one thing."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

from tree.package import PACKAGE, ROOT, contracts, layers, modules, tree_of

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
MOST_FILES = 14  # of code in one folder; more of them hide what belongs together


def told_layers(heading: str) -> list[set[str]]:
    """Return the layers in the table below one heading of docs/architecture.md, from the top down."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^##)", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert section, f"docs/architecture.md has no section {heading!r}"
    rows = [line for line in section[1].splitlines() if line.startswith("| `")]
    return [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in rows]


@pytest.mark.parametrize(
    ("heading", "container"),
    [("The project", "myserve"), ("The engine", "myserve.engine"), ("The server", "myserve.server")],
)
def test_the_tables_of_rooms_are_the_contracts(heading: str, container: str) -> None:
    assert told_layers(heading) == layers(container)


@pytest.mark.parametrize("container", ["myserve", "myserve.engine", "myserve.server"])
def test_every_room_is_in_a_layer(container: str) -> None:
    folder = PACKAGE.joinpath(*container.split(".")[1:])
    rooms = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    rooms |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert rooms == set().union(*layers(container))


def test_the_laws_are_the_contracts() -> None:
    section = re.search(r"^## Laws\n(.*?)(?=^## )", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert section
    told = re.findall(r"^- (.*)$", section[1], re.MULTILINE)
    assert sorted(told) == sorted(c["name"] for c in contracts() if c["type"] != "layers")


def test_no_folder_has_too_many_files_of_code() -> None:
    counts = Counter(path.parent for path in modules().values())
    crowded = {str(folder.relative_to(PACKAGE)): n for folder, n in counts.items() if n > MOST_FILES}
    assert crowded == {}


def test_no_folder_is_without_code() -> None:
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    empty = [f for f in folders if any(f.rglob("*.py")) and not (f / "__init__.py").exists()]
    assert empty == []


def test_a_class_name_means_one_thing() -> None:
    places = defaultdict(list)
    for name, path in modules().items():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_two_names_in_a_package_differ_by_an_s() -> None:
    names = defaultdict(set)
    for path in [*modules().values(), *PACKAGE.glob("*/**/__init__.py")]:
        place = path.parent if path.name == "__init__.py" else path
        names[place.parent].add(place.stem)
    assert [
        str((folder / name).relative_to(PACKAGE))
        for folder, here in names.items()
        for name in here
        if name + "s" in here
    ] == []


def test_every_file_begins_with_its_law() -> None:
    silent = [name for name, path in modules().items() if not ast.get_docstring(tree_of(path))]
    assert silent == []


def paths_named_in(page: Path) -> list[str]:
    """Return what a page writes in backticks and ends in `.py`: each should be a file."""
    return re.findall(r"`([\w./-]+\.py)`", page.read_text())


@cache
def files_of_code() -> frozenset[str]:
    """Return every file of Python that is ours; the environment in `.venv` has some ten thousand others."""
    folders = (ROOT / name for name in ("src", "tests", "tools", "benchmarks", "examples", "deploy"))
    return frozenset(
        "/" + path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*.py")
    )


PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    lost = [
        name
        for name in paths_named_in(page)
        if not any(path.endswith("/" + name) for path in files_of_code())
    ]
    assert lost == []
