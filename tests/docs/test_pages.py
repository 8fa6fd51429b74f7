"""What the pages say of the tree is so: links and anchors lead somewhere, lists are the code's, pictures current."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from conftest import ARCHITECTURES
from tools.docs import request_picture

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *(ROOT / name for name in ("tests/README.md", "benchmarks/README.md")),
]
DECISIONS = sorted((DOCS / "decisions").glob("[0-9]*.md"))


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings make, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
    seen = Counter[str]()
    found = set()
    for anchor in plain:
        found.add(anchor if not seen[anchor] else f"{anchor}-{seen[anchor]}")
        seen[anchor] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_their_anchors_lead_somewhere(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", DECISIONS, ids=named)
def test_a_decision_has_a_title_a_date_and_a_status(page: Path) -> None:
    first, blank, second, *_ = page.read_text().splitlines()
    assert first.startswith("# ") and not blank
    status = r"accepted|proposed|superseded by \[\d{4}\]\(\d{4}-[\w-]+\.md\)"
    assert re.fullmatch(rf"Date: 20\d\d-\d\d-\d\d · Status: ({status})", second)


def test_the_index_has_every_decision_once_by_its_title() -> None:
    index = (DOCS / "decisions" / "README.md").read_text()
    listed = re.findall(r"^\| \[(\d{4})\]\(([\w-]+\.md)\) \| (.*?) \|", index, re.MULTILINE)
    titles = [(page.name[:4], page.name, page.read_text().splitlines()[0][2:]) for page in DECISIONS]
    assert listed == titles
    assert len({number for number, _, _ in listed}) == len(listed)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    lost = []
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        nodes = ast.walk(ast.parse((ROOT / path).read_text()))
        functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        lost += [] if name in functions else [f"{path}::{name}"]
    assert lost == []


def test_the_page_of_models_lists_the_architectures_of_the_suite() -> None:
    page = (DOCS / "models.md").read_text()
    block = re.search(
        r"<!-- tested-architectures: begin.*?-->(.*?)<!-- tested-architectures: end", page, re.DOTALL
    )
    assert block
    assert re.findall(r"`(\w+)`", block[1]) == sorted(ARCHITECTURES)


def test_the_picture_of_a_request_is_what_its_script_draws() -> None:
    assert request_picture.TARGET.read_text() == request_picture.picture()


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=named)
def test_a_picture_fetches_nothing_and_runs_nothing(picture: Path) -> None:
    text = picture.read_text()
    assert not re.search(r"<script|@import|url\((?!#)|href=\"(?!#)", text)


def test_every_page_is_linked_from_another() -> None:
    pages = {page.resolve() for page in PAGES if page.is_relative_to(DOCS)}
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s:]+)\)", page.read_text())
    }
    assert {named(page) for page in pages - linked} == set()
