"""Kept responses are bounded: what was used least recently goes first, of the owner who has most."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from myserve.server.routes.responses_api.store import KeptResponse, ResponseStore, kept_response
from myserve.wire.responses_api.items import read_items, write_items


def kept(name: str, *, tokens: int = 1) -> KeptResponse:
    body: Any = {"id": name, "background": False, "output": [{"id": f"item of {name}"}]}
    return kept_response(body, [], b"[]", [0] * tokens, {})


def names(store: ResponseStore, owner: str) -> list[str]:
    """Return which of the responses are there, by their items."""
    every = ["a", "b", "c", "large", *(f"b{number}" for number in range(50))]
    return [name for name in every if store.items(owner, [f"item of {name}"])]


def test_what_was_used_least_recently_goes_first() -> None:
    store = ResponseStore(most_responses=2)
    store.put("", kept("a"))
    store.put("", kept("b"))
    assert store.get("", "a") is not None
    store.put("", kept("c"))
    assert (names(store, ""), len(store)) == (["a", "c"], 2)


def test_an_owner_makes_no_room_at_another_s_cost() -> None:
    store = ResponseStore(most_bytes=20_000)
    store.put("alice", kept("a"))
    for number in range(50):
        store.put("bob", kept(f"b{number}", tokens=100))
    assert names(store, "alice") == ["a"]
    assert names(store, "bob")[-1] == "b49" and 1 <= len(names(store, "bob")) < 20
    assert store.get("bob", "a") is None


def test_one_that_is_too_large_is_not_kept_and_bounds_hold() -> None:
    store = ResponseStore(most_bytes=20_000)
    store.put("", kept("large", tokens=10_000))
    assert len(store) == 0
    store.put("", kept("a"))
    store.put("", kept("a"))
    store.forget("", "a")
    store.forget("", "a")
    assert len(store) == 0 and names(store, "") == []


def test_an_item_is_there_as_long_as_a_response_has_it() -> None:
    store = ResponseStore()
    item = [{"id": "item of a", "type": "message", "n": 10**30}]
    for name in ("a", "b"):
        store.put("", kept_response({"id": name, "background": False, "output": []}, item, b"[]", [], {}))  # type: ignore[typeddict-item]
    store.forget("", "b")
    assert store.items("", ["item of a"]) == {"item of a": item[0]}
    assert store.items("other", ["item of a"]) == {}
    store.forget("", "a")
    assert store.items("", ["item of a"]) == {}


@pytest.mark.parametrize(
    "items",
    [
        [{"type": "reasoning"}] * 2000,
        [{"type": "mcp_call", "x": [{}] * 30_000}],
        [{"role": "user", "content": [{"type": "input_text", "text": ""}] * 5000}],
    ],
    ids=["empty", "nested", "parts"],
)
def test_what_is_kept_takes_no_more_memory_than_it_is_counted_with(items: list[Any]) -> None:
    def bytes_of(make: Callable[[], Any]) -> tuple[Any, int]:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        gc.collect()
        return made, tracemalloc.get_traced_memory()[0] - before

    def keep() -> KeptResponse:
        listed = [item | {"id": f"item_{number:032d}"} for number, item in enumerate(items)]
        body: Any = {"id": "a", "background": False, "output": []}
        return kept_response(body, listed, write_items(read_items(items)), list(range(1000)), {})

    tracemalloc.start()
    try:
        made, taken = bytes_of(keep)
        _, as_objects = bytes_of(lambda: read_items(items))
    finally:
        tracemalloc.stop()
    other = 200_000  # that threads of servers beside this have taken meanwhile
    assert taken <= made.size + other
    assert as_objects > 2 * other  # the control: what is measured is there
