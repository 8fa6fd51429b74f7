"""Chooses one of several deployments for a request, by prefix affinity, load and recent failures. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["AFFINITY_SLACK", "PREFIX_LENGTH", "Deployment", "choose"]

# A favourite keeps its prompts until it is this many samples busier than the idlest: a prefix found in the
# cache is worth a short queue, not a long one.
AFFINITY_SLACK = 8
# Tokens that decide the favourite: enough to tell prompts apart, few enough that turns agree.
PREFIX_LENGTH = 64
FAILURES_TO_REST = 2
FIRST_REST = 2.0  # seconds; doubles with every failure after it
LONGEST_REST = 60.0


@dataclass(slots=True)
class Deployment:
    """One server: its address, its load, its recent failures."""

    url: str
    in_flight: int = 0
    failures: int = 0  # in a row
    rests_until: float = 0.0  # on the caller's clock

    def succeeded(self) -> None:
        """Forget its failures."""
        self.failures, self.rests_until = 0, 0.0

    def failed(self, now: float) -> None:
        """Count a failure, and rest it after `FAILURES_TO_REST` in a row: its samples are asked for elsewhere."""
        self.failures += 1
        if self.failures >= FAILURES_TO_REST:
            rest = FIRST_REST * 2.0 ** min(self.failures - FAILURES_TO_REST, 60)
            self.rests_until = now + min(LONGEST_REST, rest)


def choose(deployments: Sequence[Deployment], prompt_token_ids: Sequence[int], now: float) -> Deployment:
    """Return the favourite of this prompt's prefix, unless it rests or is too busy; then the idlest.

    >>> one, two = Deployment("http://one"), Deployment("http://two")
    >>> favourite = choose([one, two], [1, 2, 3], now=0.0)
    >>> favourite.in_flight = 100
    >>> choose([one, two], [1, 2, 3], now=0.0) is favourite
    False
    """
    if len(deployments) == 1:
        return deployments[0]
    awake = [d for d in deployments if d.rests_until <= now] or list(deployments)
    prefix = repr(list(prompt_token_ids[:PREFIX_LENGTH])).encode()
    # Rendezvous hashing: when one goes or comes, only its own prompts move.
    favourite = max(
        awake, key=lambda d: hashlib.blake2b(prefix, key=d.url.encode()[:64], digest_size=8).digest()
    )
    idlest = min(awake, key=lambda d: d.in_flight)
    return favourite if favourite.in_flight <= idlest.in_flight + AFFINITY_SLACK else idlest
