"""The journal: what a newcomer has to do, and what another controller reads of it."""

from __future__ import annotations

from cluster.stores import Store
from myserve.cluster.journal import Adapter, FleetJournal, FleetWeights

WHOLE, PART = FleetWeights("/w/1", 3, checksum="c"), FleetWeights("/w/2", 4, partial=True)


def test_a_store_holds_all_of_it() -> None:
    journal = FleetJournal(
        (WHOLE, PART, Adapter("a", "/l/a")), FleetWeights("/w/5", 9), "swap", "keep", ("weights",)
    )
    assert FleetJournal.read(Store(journal)) == journal
    assert FleetJournal.read(Store()) == FleetJournal()


def test_a_replica_is_told_what_it_lacks_and_nothing_else() -> None:
    a, b = Adapter("a", "/l/a"), Adapter("b", "/l/b")
    journal = FleetJournal((WHOLE, a, PART, b))
    assert journal.missing(0, 0) == (WHOLE, a, PART, b)
    assert journal.missing(3, 1) == (PART, b)
    assert journal.missing(4, 2) == ()


def test_a_whole_snapshot_makes_those_before_it_void_and_keeps_adapters() -> None:
    a, new = Adapter("a", "/l/a"), FleetWeights("/w/9", 9)
    assert FleetJournal((WHOLE, PART, a)).with_change(new).changes == (a, new)
