"""Slots for the states of recurrent layers, by id: who holds which. No tensors."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["StateSlots"]


class StateSlots:
    """`num_slots` slots, each with the state of all recurrent layers after some tokens of one request.

    A slot is held by the requests that read it, or that a step writes it for, and free otherwise.

    >>> slots = StateSlots(2)
    >>> a = slots.allocate()
    >>> slots.hold(a); slots.release(a); slots.num_free
    1
    >>> slots.release(a); slots.num_free
    2
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._holders = [0] * num_slots
        self._free = list(range(num_slots))[::-1]  # last = next out

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """Take a free slot."""
        assert self._free, "asked for a slot, and none is free"
        slot = self._free.pop()
        self._holders[slot] = 1
        return slot

    def hold(self, slot: int) -> None:
        """Add a holder: a choice that goes on from the same state."""
        assert self._holders[slot] > 0, f"slot {slot} is shared but not held"
        self._holders[slot] += 1

    def release(self, slot: int) -> None:
        """Take a holder away."""
        assert self._holders[slot] > 0, f"slot {slot} is released but not held"
        self._holders[slot] -= 1
        if not self._holders[slot]:
            self._free.append(slot)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that each slot counts once for each request that has it (-1: none), and is free when none does."""
        counted = [0] * self.num_slots
        for slot in held:
            if slot >= 0:
                counted[slot] += 1
        assert counted == self._holders, "holders differ from the requests' slots: a leak, or a double use"
        free = [slot for slot, holders in enumerate(counted) if not holders]
        assert sorted(self._free) == free, "the list of free slots is wrong"
