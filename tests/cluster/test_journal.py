"""The journal: what a newcomer has to do, and a file that is whole or the one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from myserve.cluster.journal import Adapter, FleetJournal, FleetWeights

WHOLE, PART = FleetWeights("/w/1", 3, checksum="c"), FleetWeights("/w/2", 4, partial=True)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    journal = FleetJournal(
        (WHOLE, PART, Adapter("a", "/l/a")), FleetWeights("/w/5", 9), "swap", "keep", ("weights",)
    )
    journal.write(tmp_path / "deep" / "j.json")
    assert FleetJournal.read(tmp_path / "deep" / "j.json") == journal
    assert FleetJournal.read(tmp_path / "none") == FleetJournal()


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "j.json"
    FleetJournal((WHOLE,)).write(file)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        FleetJournal((WHOLE, PART)).write(file)
    assert FleetJournal.read(file) == FleetJournal((WHOLE,))


def test_a_replica_is_told_what_it_lacks_and_nothing_else() -> None:
    a, b = Adapter("a", "/l/a"), Adapter("b", "/l/b")
    journal = FleetJournal((WHOLE, a, PART, b))
    assert journal.missing(0, 0) == (WHOLE, a, PART, b)
    assert journal.missing(3, 1) == (PART, b)
    assert journal.missing(4, 2) == ()


def test_a_whole_snapshot_makes_those_before_it_void_and_keeps_adapters() -> None:
    a, new = Adapter("a", "/l/a"), FleetWeights("/w/9", 9)
    assert FleetJournal((WHOLE, PART, a)).with_change(new).changes == (a, new)
