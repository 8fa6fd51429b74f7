"""Replicas of one class give the same bits; one bit of one logprob makes another class."""

from __future__ import annotations

import math

from cluster.conftest import SmallFleet
from myserve.cluster.probe import digest_of
from myserve.engine.outputs import Delta, TokenOutput


def test_replicas_on_one_machine_are_of_one_class(small_fleet: SmallFleet) -> None:
    classes = {server.bits for server in small_fleet.replicas.values()}
    assert len(classes) == 1 and len(classes.pop()) == 8
    assert small_fleet.engine.exactness["replica_classes"] == small_fleet.replicas["one"].bits


def test_one_bit_makes_another_class() -> None:
    def of(logprob: float) -> str:
        return digest_of([Delta(0, "a", (TokenOutput(5, logprob, -0.5, ((5, logprob), (6, -2.0))),))])

    assert of(-0.25) == of(-0.25) != of(math.nextafter(-0.25, 0))
