"""The README's figures are the ledger's: same date, commit and numbers, in an entry that names its command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| ([^|]+) \| ([\d.]+) (ms/step|tok/s|s|GiB) \| [^|]*?([\d.]+) \| ([\d.]+) \| ([\d-]+), ([\w-]+) \|$",
    (ROOT / "README.md").read_text(),
    re.MULTILINE,
)
ENTRIES = re.split(r"^(?=## \d{4}-)", (ROOT / "benchmarks" / "LEDGER.md").read_text(), flags=re.MULTILINE)[1:]


def entries_of(date: str, commit: str) -> list[str]:
    """Return the entries of a commit: those with its name in their heading, or in the text of a note."""
    return [e for e in ENTRIES if e.startswith(f"## {date} · {commit}\n") or f"commit {commit})" in e]


def has(entry: str, number: str) -> bool:
    return (
        re.search(rf"(?<![\d.]){re.escape(number.removesuffix('.0'))}(?:\.0)?(?![\d.]*\d)", entry) is not None
    )


def test_every_row_was_read() -> None:
    section = (ROOT / "README.md").read_text().partition("## Figures")[2].partition("## ")[0]
    assert len(ROWS) == len(re.findall(r"^\| (?!workload|---)", section, re.MULTILINE)) > 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[3]}")
def test_a_figure_is_the_ledgers(row: tuple[str, ...]) -> None:
    _, ours, _, theirs, _, date, commit = row
    found = [e for e in entries_of(date, commit) if has(e, ours) and has(e, theirs)]
    assert found, "the ledger has no such entry"
    assert any("python -m benchmarks" in e or "`--peer" in e for e in found), "the entry names no command"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[3]}")
def test_a_ratio_is_of_its_two_figures(row: tuple[str, ...]) -> None:
    _, ours, unit, theirs, speed, *_ = row
    ratio = float(ours) / float(theirs)
    ratio = ratio if unit == "tok/s" else 1 / ratio
    assert ratio == pytest.approx(float(speed), rel=0.02), "the figures are rounded, to a hundredth at worst"
