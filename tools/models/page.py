"""The table of docs/models.md, made of verdicts; and what a new table has that the page has not."""

from __future__ import annotations

import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import transformers

from tools.models.kinds import VARIANTS
from tools.models.trial import FLOAT32_ALONE, Verdict

__all__ = ["BEGIN", "END", "PAGE", "changes", "rows_of", "table", "write_page"]

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- models: begin", "<!-- models: end -->"
SERVED, TEXT_ALONE, DEPENDENT, OFF_POLICY, AS_VARIANTS = (
    "served, exact",
    "served, exact, for text alone",
    "served; a request's bits depend on its batch",
    "served, exact; `exact_forward` has other bits",
    "served, exact, as variants",
)
HALF_REFUSED = f"served, exact, {FLOAT32_ALONE}"
LIMITED = (
    "served, exact, with a limit: a context ends where its index would begin to choose (`index_topk` tokens)"
)
# The row of the table that a refusal stands in, by a word of its sentence.
_REASONS = {
    "AttentionInterface": "its attention does not go through transformers' interface",
    "layers of ": "recurrent, linear or sparse layers",
    "mask of its own": "gives its attention a mask that is no window",
    "hides other positions": "gives its attention a mask that is no window",
    "other keys": "attends over other keys than those of its own tokens",
    "of its own, so its requests": "keeps state, masks or positions of its own",
    "encoder-decoder": "an encoder and a decoder",
    "context may be": "its config has no number for how long a context may be",
}
OTHERWISE = "its code does not run with the engine's attention and products"


def _row(verdict: Verdict) -> str:
    """Return the row of the table that a verdict stands in."""
    if verdict.result == "refused":
        return f"refused: {_reason(verdict.words)}"
    if verdict.result == "not made":
        return "not tried: no tiny one could be made of its config"
    if verdict.result != "served":
        return f"{verdict.result}: to be mended"
    if not verdict.rows_are_independent or verdict.differs:
        return DEPENDENT
    if not verdict.trainer_has_the_bits:
        return OFF_POLICY
    if verdict.limit:
        return HALF_REFUSED if verdict.limit.startswith(FLOAT32_ALONE) else LIMITED
    if verdict.is_text_alone:
        return TEXT_ALONE
    return AS_VARIANTS if verdict.kind in VARIANTS else SERVED


def table(row_of: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the page's table, from the row that each kind stands in."""
    rows: dict[str, list[str]] = defaultdict(list)
    for kind, row in row_of.items():
        rows[row].append(kind)
    yield "| result | kinds |"
    yield "|---|---|"
    first = [SERVED, LIMITED, HALF_REFUSED, TEXT_ALONE, AS_VARIANTS, OFF_POLICY, DEPENDENT]
    last = sorted(row for row in rows if row.startswith("not tried"))
    for row in [*first, *sorted(rows.keys() - {*first, *last}), *last]:
        if rows[row]:
            yield f"| {row} | {_listed(rows[row])} |"


def rows_of(page: Path = PAGE) -> Mapping[str, str]:
    """Return the row of each kind that the page's table names."""
    inside = page.read_text().split(BEGIN)[1].split(END)[0].splitlines()
    cells = [line.split("|") for line in inside if line.startswith("| ") and "`" in line]
    return {kind: cell[1].strip() for cell in cells for kind in re.findall(r"`([^`]+)`", cell[-2])}


def changes(verdicts: Sequence[Verdict], page: Path = PAGE, *, is_whole: bool = True) -> list[str]:
    """Return a line for each kind that stands in another row than on the page; of a whole run, also those gone."""
    before = rows_of(page)
    if not is_whole:
        before = {kind: row for kind, row in before.items() if kind in {verdict.kind for verdict in verdicts}}
    now = {verdict.kind: _row(verdict) for verdict in verdicts}
    return [
        f"{kind}: was {before.get(kind, 'not there')}; is {now.get(kind, 'not there')}"
        for kind in sorted(before.keys() | now.keys())
        if before.get(kind) != now.get(kind)
    ]


def _listed(kinds: Sequence[str]) -> str:
    return " ".join(f"`{kind}`" for kind in sorted(kinds))


def _reason(words: str) -> str:
    return next((row for word, row in _REASONS.items() if word in words), OTHERWISE)


def write_page(verdicts: Sequence[Verdict], page: Path = PAGE, *, is_whole: bool = True) -> None:
    """Put a table of the verdicts in place of the page's; where it is not whole, the other kinds keep their rows."""
    text = page.read_text()
    told = {verdict.kind: _row(verdict) for verdict in verdicts}
    if is_whole:
        when = f"whole on {_now()}"
    else:
        head = text.split(BEGIN)[1].split("-->")[0]
        whole = re.search(r"whole on ([^;)]*)", head)
        when = f"whole on {whole[1] if whole else 'no day'}; parts of it on {_now()}"
        told = {**rows_of(page), **told}
    lines = [f"{BEGIN} (written by `python -m tools.models`, {when}) -->", *table(told), END]
    pattern = re.escape(BEGIN) + r".*?" + re.escape(END)
    page.write_text(re.sub(pattern, lambda _: "\n".join(lines), text, flags=re.DOTALL))


def _now() -> str:
    commit = subprocess.run(
        ["git", "describe", "--always"], cwd=PAGE.parent, capture_output=True, text=True, check=True
    ).stdout.strip()
    return f"{time.strftime('%Y-%m-%d')}, commit {commit}, transformers {transformers.__version__}"
