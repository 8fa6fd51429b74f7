"""Slots of states: each has its holders, and the last to let go frees it."""

from __future__ import annotations

import pytest

from myserve.engine.scheduling.state_slots import StateSlots


def test_a_slot_is_free_when_its_last_holder_lets_go() -> None:
    slots = StateSlots(2)
    a, b = slots.allocate(), slots.allocate()
    slots.hold(a)
    slots.check_integrity([a, a, b, -1])
    slots.release(a)
    assert slots.num_free == 0
    slots.release(a)
    assert slots.num_free == 1 and slots.allocate() == a


def test_what_nobody_holds_is_neither_shared_nor_released() -> None:
    slots = StateSlots(1)
    for move in (slots.hold, slots.release):
        with pytest.raises(AssertionError, match="not held"):
            move(0)
    slots.allocate()
    with pytest.raises(AssertionError, match="none is free"):
        slots.allocate()


def test_a_state_is_found_by_name_until_its_slot_is_handed_out() -> None:
    slots = StateSlots(3)
    a, b, c = (slots.allocate() for _ in range(3))
    slots.publish(a, 7)
    slots.publish(b, 8)
    slots.publish(c, 8)  # computed side by side: the first one stays
    slots.release(a)
    slots.release(b)
    slots.release(c)
    assert (slots.find(7), slots.find(8), slots.num_free) == (a, b, 3)
    assert slots.allocate() == c, "what remembers nothing goes first"
    slots.hold(b)
    assert slots.is_held(b) and slots.allocate() == a and slots.find(7) is None
    slots.check_integrity([a, b, c])
    slots.forget(8)
    slots.forget(9)
    assert slots.find(8) is None
    slots.release(b)
    assert slots.num_free == 1


def test_a_leak_and_a_double_use_are_found() -> None:
    slots = StateSlots(2)
    slots.check_integrity([])
    slot = slots.allocate()
    for wrong in ([], [slot, slot]):
        with pytest.raises(AssertionError, match="a leak, or a double use"):
            slots.check_integrity(wrong)
