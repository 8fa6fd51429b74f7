"""Responses that can be asked for later, in memory and bounded: each is its key owner's alone."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from sys import getsizeof
from typing import Any

from pydantic_core import from_json

from myserve.wire.base import to_json
from myserve.wire.responses_api.answer import ResponseObject

__all__ = ["KeptResponse", "ResponseStore", "kept_response"]

MOST_RESPONSES = 65_536
MOST_BYTES = 256 << 20
RESPONSE_BYTES = 1024  # of what holds a response, beside its parts
ITEM_BYTES = 512  # of an item's id, and of its place in the index
EVENT_BYTES = 48  # of what holds an event


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """A response, the items that it answered, and what it was drawn behind and as.

    All of it is JSON and flat arrays: as many bytes as it is counted with, where Python's objects take up to fifty
    times their JSON.
    """

    id: str
    is_background: bool
    body: bytes
    items: bytes  # a list, with ids
    item_ids: Sequence[str]  # of these, and of the output
    conversation: bytes  # a list of all items, the output's too
    token_ids: array[int]  # of its prompt and of what was drawn
    shown: Mapping[str, bytes]  # what stands before the items in the prompt, as JSON
    events: Sequence[bytes] = ()  # framed, of one that was made in the background as a stream

    @property
    def size(self) -> int:
        """Return about how many bytes it takes."""
        written = len(self.body) + len(self.items) + len(self.conversation)
        lists = sum(ITEM_BYTES + getsizeof(item_id) for item_id in self.item_ids)
        lists += sum(EVENT_BYTES + len(event) for event in self.events)
        tokens = self.token_ids.itemsize * len(self.token_ids)
        return RESPONSE_BYTES + written + lists + tokens + sum(map(len, self.shown.values()))

    def listed_items(self) -> list[dict[str, Any]]:
        """Return the items that it answered."""
        listed: list[dict[str, Any]] = from_json(self.items)
        return listed

    def every_item(self) -> list[dict[str, Any]]:
        """Return the items that it answered, and those of its output."""
        output: list[dict[str, Any]] = from_json(self.body)["output"]
        return [*self.listed_items(), *output]


def kept_response(
    body: ResponseObject,
    items: Sequence[Mapping[str, Any]],
    conversation: bytes,
    token_ids: Sequence[int],
    shown: Mapping[str, bytes],
) -> KeptResponse:
    """Return a response as it is kept. `items` are those that it answered, with ids."""
    return KeptResponse(
        body["id"],
        bool(body["background"]),
        _copied(to_json(body)),
        _copied(to_json(items)),
        [str(item["id"]) for item in (*items, *body["output"])],
        conversation,
        array("i", token_ids),
        shown,
    )


def _copied(written: bytes) -> bytes:
    """Return bytes in memory of their own: orjson's keep their whole buffer, which may be far larger."""
    return bytes(memoryview(written))


class ResponseStore:
    """Keeps responses by their owner and id. What was used least recently goes first: of the owner who has most.

    Used from the event loop and from threads that write large answers.
    """

    def __init__(self, most_responses: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self._most_responses, self._most_bytes = most_responses, most_bytes
        self._kept: dict[str, OrderedDict[str, KeptResponse]] = {}  # by owner
        self._places: dict[str, dict[str, dict[str, None]]] = {}  # by owner and item: ids of responses
        self._sizes: dict[tuple[str, str], int] = {}  # by owner and id
        self._bytes: dict[str, int] = {}  # by owner
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sizes)

    def put(self, owner: str, kept: KeptResponse) -> None:
        """Keep a response; others are forgotten where there is no room; where it is too large alone, it is not kept."""
        size = kept.size
        with self._lock:
            self._forget(owner, kept.id)
            if size > self._most_bytes:
                return
            self._kept.setdefault(owner, OrderedDict())[kept.id] = kept
            places = self._places.setdefault(owner, {})
            for item_id in kept.item_ids:
                places.setdefault(item_id, {})[kept.id] = None
            self._sizes[owner, kept.id] = size
            self._bytes[owner] = self._bytes.get(owner, 0) + size
            while len(self._sizes) > self._most_responses or sum(self._bytes.values()) > self._most_bytes:
                largest = max(self._bytes, key=self._bytes.__getitem__)
                self._forget(largest, next(iter(self._kept[largest])))

    def get(self, owner: str, response_id: str) -> KeptResponse | None:
        """Return a response of this owner, and note that it was used."""
        with self._lock:
            mine = self._kept.get(owner, OrderedDict())
            if response_id in mine:
                mine.move_to_end(response_id)
            return mine.get(response_id)

    def forget(self, owner: str, response_id: str) -> None:
        """Forget a response, if it is there."""
        with self._lock:
            self._forget(owner, response_id)

    def items(self, owner: str, wanted: Collection[str]) -> dict[str, Mapping[str, Any]]:
        """Return those of an owner's items that have these ids, by id; each as a response has it."""
        with self._lock:
            places, mine = self._places.get(owner, {}), self._kept.get(owner, OrderedDict())
            having = {next(reversed(places[item_id])) for item_id in wanted if item_id in places}
            responses = [mine[response_id] for response_id in mine if response_id in having]
        found = {str(item["id"]): item for kept in responses for item in kept.every_item()}
        return {item_id: found[item_id] for item_id in wanted if item_id in found}

    def _forget(self, owner: str, response_id: str) -> None:
        mine = self._kept.get(owner, OrderedDict())
        kept = mine.pop(response_id, None)
        if kept is None:
            return
        places = self._places[owner]
        for item_id in kept.item_ids:
            having = places.get(item_id, {})
            having.pop(response_id, None)
            if not having:
                places.pop(item_id, None)
        self._bytes[owner] -= self._sizes.pop((owner, response_id))
        if not mine:
            del self._kept[owner], self._bytes[owner], self._places[owner]
