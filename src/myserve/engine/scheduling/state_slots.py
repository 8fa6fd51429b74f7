"""Slots for the states of recurrent layers, by id: their holders, and what they still remember. No tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["StateSlots"]


class StateSlots:
    """`num_slots` slots, each with the state of all recurrent layers after some tokens of one request.

    A slot is held by the requests that read it, or that a step writes it for, and free otherwise. A free one may still
    be named, by the name that the prefix cache has for the content up to there (`BlockPool`), and be taken up again
    until it is handed out for something else (least recently used first).

    >>> slots = StateSlots(2)
    >>> a = slots.allocate()
    >>> slots.publish(a, 7); slots.release(a)
    >>> slots.find(7) == a, slots.num_free
    (True, 2)
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._holders = [0] * num_slots
        self._free: OrderedDict[int, None] = OrderedDict(
            (slot, None) for slot in range(num_slots)
        )  # first = next out
        self._slot_of: dict[int, int] = {}  # by the content's name
        self._name_of: dict[int, int] = {}
        self.num_ever_held = 0  # slots from this one on have never been handed out

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_held(self, slot: int) -> bool:
        return self._holders[slot] > 0

    def allocate(self) -> int:
        """Take a free slot, forgetting what the least recently used one remembered."""
        assert self._free, "asked for a slot, and none is free"
        slot = self._free.popitem(last=False)[0]
        self._forget(slot)
        self._holders[slot] = 1
        self.num_ever_held = max(self.num_ever_held, slot + 1)
        return slot

    def hold(self, slot: int) -> None:
        """Add a holder: a choice, or a later request, that goes on from the same state."""
        assert self._holders[slot] > 0 or slot in self._name_of, f"slot {slot} is shared but not held"
        self._free.pop(slot, None)
        self._holders[slot] += 1

    def release(self, slot: int) -> None:
        """Take a holder away. What remembers nothing is handed out before any that does."""
        assert self._holders[slot] > 0, f"slot {slot} is released but not held"
        self._holders[slot] -= 1
        if not self._holders[slot]:
            self._free[slot] = None
            if slot not in self._name_of:
                self._free.move_to_end(slot, last=False)

    def publish(self, slot: int, name: int) -> None:
        """Name a state, so that others may find it; where two computed the same, the first one stays."""
        if name not in self._slot_of:
            self._forget(slot)
            self._slot_of[name], self._name_of[slot] = slot, name

    def find(self, name: int) -> int | None:
        """Return the slot of the state after the content of that name, or None."""
        return self._slot_of.get(name)

    def forget(self, name: int) -> None:
        """Let a state be found no longer. Harmless where there is none of that name."""
        slot = self._slot_of.get(name)
        if slot is not None:
            self._forget(slot)
            if slot in self._free:
                self._free.move_to_end(slot, last=False)

    def _forget(self, slot: int) -> None:
        name = self._name_of.pop(slot, None)
        if name is not None:
            del self._slot_of[name]

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that each slot counts once for each request that has it (-1: none), and is free when none does."""
        counted = [0] * self.num_slots
        for slot in held:
            if slot >= 0:
                counted[slot] += 1
        assert counted == self._holders, "holders differ from the requests' slots: a leak, or a double use"
        free = [slot for slot, holders in enumerate(counted) if not holders]
        assert sorted(self._free) == free, "the list of free slots is wrong"
        assert {name: slot for slot, name in self._name_of.items()} == self._slot_of, "names are out of step"
