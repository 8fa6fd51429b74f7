"""Tries a tiny random model of every kind that transformers knows: `python -m tools.models` (an hour of two cores).

    python -m tools.models                              # all kinds and variants; rewrites the table of docs/models.md
    python -m tools.models --results FILE --seconds 240 # a piece of it; again, it goes on where it was
    python -m tools.models --check                      # status 2 where the page says otherwise: a new transformers
    python -m tools.models --sizes odd                  # other sizes of each type; leaves the page
    python -m tools.models doge llama-yarn              # some, printed; with --write their rows are changed

Each kind is tried in a process of its own. It must be served with transformers' logprobs and greedy tokens, beyond its
window, with the same bits alone, in company, in pieces and after a restart; or be refused in one sentence. Ends with
status 1 where a kind is served wrong, ends its process, or fails in another way.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tools.models.kinds import KINDS, TYPES
from tools.models.page import changes, write_page
from tools.models.trial import Verdict, try_kind

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Try kinds; return 1 where one is bad, 2 where `--check` finds the page another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", help="all, where none is named; then the page is rewritten")
    parser.add_argument("--results", type=Path, help="a file of verdicts: kinds in it are not tried again")
    parser.add_argument(
        "--seconds", type=float, help="stop after so long, with status 3; --results goes on later"
    )
    parser.add_argument("--write", action="store_true", help="put named kinds into their rows of the page")
    parser.add_argument(
        "--check", action="store_true", help="leave the page; status 2 where a kind stands in another row"
    )
    parser.add_argument(
        "--sizes",
        choices=("usual", "odd"),
        default="usual",
        help="odd: five heads on one, no multiples of 16, tied",
    )
    options = parser.parse_args(arguments)
    is_odd = options.sizes == "odd"
    known = {verdict.kind: verdict for verdict in _read(options.results)}
    end = time.monotonic() + (options.seconds or float("inf"))
    wanted = options.kinds or list(TYPES if is_odd else KINDS)
    for kind in wanted:
        if kind in known and not options.kinds:
            continue
        if time.monotonic() > end:
            return 3
        known[kind] = try_kind(kind, sizes=options.sizes)
        print(known[kind].line(), flush=True)
        if options.results is not None:
            options.results.write_text("\n".join(json.dumps(asdict(v)) for v in known.values()) + "\n")
    verdicts = [known[kind] for kind in wanted]
    changed = [] if is_odd else changes(verdicts, is_whole=not options.kinds)
    print("\n".join(changed))
    if not is_odd and not options.check and (options.write or not options.kinds):
        write_page(verdicts, is_whole=not options.kinds)
    bad = [verdict for verdict in verdicts if verdict.is_bad]
    print(f"{len(verdicts)} kinds, {len(bad)} of them bad")
    return 1 if bad else 2 if options.check and changed else 0


def _read(file: Path | None) -> list[Verdict]:
    if file is None or not file.exists():
        return []
    return [Verdict(**json.loads(line)) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
