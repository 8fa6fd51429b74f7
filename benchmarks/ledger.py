"""Appends measurements to LEDGER.md, with machine and command. Nothing is taken out, failures least of all.

python -m benchmarks.ledger "padded decode to 8 rows instead of 4: 3 % slower, dropped"
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.comparison import Comparison, cells, header

LEDGER = Path(__file__).with_name("LEDGER.md")


def entry(
    note: str, *, commit: str, when: str, comparison: Comparison | None = None, contenders: Sequence[str] = ()
) -> str:
    """Return one entry in Markdown.

    >>> print(entry("Tried: slower.", commit="abc1234", when="2026-01-02"))
    ## 2026-01-02 · abc1234
    <BLANKLINE>
    Tried: slower.
    <BLANKLINE>
    """
    lines = [f"## {when} · {commit}", "", note, ""]
    if comparison is None:
        return "\n".join(lines)
    lines += [f"Machine: {comparison.machine}", "", f"Command: `{comparison.command}`", ""]
    columns = header(contenders)
    if rows := comparison.rows():
        lines += [_line(columns), _line(["---"] * len(columns))]
        lines += [_line(cells(row, contenders)) for row in rows]
    lines += [
        "",
        *(f"{line[0]}, ms: {_named(contenders, line[2:])}" for line in comparison.cold_rows(contenders)),
    ]
    if scenarios := comparison.scenario_rows(contenders):
        lines += ["", _line(["scenario", "unit", *contenders]), _line(["---"] * (2 + len(contenders)))]
        lines += [_line(line) for line in scenarios]
    if comparison.rate is not None:
        lines += ["", f"Poisson arrivals: {comparison.rate:.3f} requests a second."]
    lines += ["", f"CPU in use by others when a run began: {comparison.busy:.0%} at most."]
    facts = [("ready after, s", comparison.ready_s), ("peak memory, GiB", comparison.peak_gib)]
    lines += ["", *(f"{label}: {_listed(values)}" for label, values in facts if values)]
    lines += [f"Failed: {failure}" for failure in comparison.failures]
    return "\n".join([*lines, ""])


def append(text: str, path: Path = LEDGER) -> None:
    """Append an entry: the newest comes last."""
    with path.open("a", encoding="utf-8") as ledger:
        ledger.write("\n" + text)


def commit() -> str:
    """Return the commit that is measured, with `-dirty` where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=LEDGER.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def today() -> str:
    """Return the date in UTC."""
    return datetime.now(UTC).date().isoformat()


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _named(names: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit('usage: python -m benchmarks.ledger "what was tried, and what came out"')
    append(entry(sys.argv[1], commit=commit(), when=today()))
