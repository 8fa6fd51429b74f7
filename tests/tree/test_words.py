"""Words of earlier versions that the field does not have stay out of code and pages (docs/glossary.md lists them)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tree.package import PACKAGE, ROOT

REPLACED = r"seed documents?\b|the seeds?'s?\b|rows of nobody|\bdeeds?\b|packing check"
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


@pytest.mark.parametrize(
    "word", ["deterministic", "batch-invariant", "RoPE", "RMSNorm", "SwiGLU", "GEMM", "prefault"]
)
def test_the_fields_words_are_found(word: str) -> None:
    assert any(word.lower() in Path(page).read_text().lower() for page in PAGES)
    assert any(word.lower() in file.read_text().lower() for file in PACKAGE.rglob("*.py"))
