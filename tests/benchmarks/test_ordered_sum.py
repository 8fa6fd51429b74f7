"""A sum over ranks in a fixed order has the same bits on one rank and on two; gloo's own has not."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tree.package import ROOT
from warm_python import warm_python


def digests(folder: Path, ranks: int) -> dict[str, set[str]]:
    command = [*warm_python(), "-m", "benchmarks.fleet.ordered_sum"]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder / f"of-{ranks}")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(ranks)
    ]
    said: dict[str, set[str]] = {}
    for process in running:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0
        for name, digest in map(str.split, output.splitlines()):
            said.setdefault(name, set()).add(digest)
    return said


def test_the_bits_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    one, two = digests(tmp_path, 1), digests(tmp_path, 2)
    assert len(one["ordered"]) == 1 and one["ordered"] == two["ordered"]
    # control: added as the ranks happen to cut it, it has other bits
    assert one["usual"] != two["usual"]
