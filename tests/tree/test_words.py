"""Words of earlier versions that the field does not have stay out of code and pages (docs/glossary.md lists them)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tree.package import PACKAGE, ROOT, tree_of

REPLACED = (
    r"seed documents?\b|the seeds?'s?\b|rows of nobody|\bdeeds?\b|packing check|in company|\bimpatient|listened to"
    r"|\bend_begun\b|\bTO_SAY_SO\b|\bA_LITTLE\b|those_that_matter|vector_math|edge_by_bisection|step_inputs\.py"
)
# A docstring begins with what a function does, what a value is or what a class holds.
NOT_FIRST = {"what", "whether", "where", "how", "who", "which", "of", "likewise"}
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("README.md", "CHANGELOG.md"))]
FILES = [*sorted(PACKAGE.rglob("*.py")), *PAGES]


def test_the_replaced_words_stay_away() -> None:
    found = []
    for file in FILES:
        text = file.read_text()
        if file.name == "glossary.md":
            text = text.partition("## Replaced words")[0]
        found += [f"{file.relative_to(ROOT)}: {word}" for word in re.findall(REPLACED, text, re.IGNORECASE)]
    assert found == []


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                first = re.split(r"[^a-z]", text.lower(), maxsplit=1)[0]
                if first in NOT_FIRST or text.lower().startswith("the same"):
                    found.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []


@pytest.mark.parametrize(
    "word", ["deterministic", "batch-invariant", "RoPE", "RMSNorm", "SwiGLU", "GEMM", "prefault"]
)
def test_the_fields_words_are_found(word: str) -> None:
    assert any(word.lower() in Path(page).read_text().lower() for page in PAGES)
    assert any(word.lower() in file.read_text().lower() for file in PACKAGE.rglob("*.py"))
