"""Weights that come in parts: collected between a start and a finish, and put in place together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from myserve.engine.memory.available import free_host_memory
from myserve.errors import NotEnoughMemoryError, RequestError

__all__ = ["WeightTransfer"]


class WeightTransfer:
    """The tensors of one model's update as far as they have come. Used on the event loop alone.

    >>> transfer = WeightTransfer()
    >>> transfer.start()
    >>> transfer.add({"a": 1}); transfer.add({"b": 2})
    >>> transfer.finish(), transfer.is_open
    ({'a': 1, 'b': 2}, False)
    """

    def __init__(self) -> None:
        self.is_open = False
        self._tensors: dict[str, Any] = {}

    def start(self) -> None:
        """Begin an update; what an unfinished one had is dropped, as its sender has begun again."""
        self.is_open, self._tensors = True, {}

    def add(self, tensors: Mapping[str, Any]) -> None:
        """Keep some tensors. Raises RequestError for one that is there already, NotEnoughMemoryError."""
        if twice := sorted(tensors.keys() & self._tensors.keys()):
            raise RequestError(
                f"{twice[0]} was sent twice in one update; /start_weight_update begins a new one",
                param="update_info",
                code="bad_snapshot",
            )
        size = sum(getattr(tensor, "nbytes", 0) for tensor in tensors.values())
        if size > free_host_memory():
            self.drop()
            raise NotEnoughMemoryError("the parts of this update do not fit the memory; nothing was changed")
        self._tensors |= tensors

    def finish(self) -> dict[str, Any]:
        """Return all that came, and end the update. Raises RequestError where none was begun."""
        if not self.is_open:
            raise RequestError("no weight update was begun: /start_weight_update comes first")
        tensors = self._tensors
        self.drop()
        return tensors

    def drop(self) -> None:
        """End the update without effect."""
        self.is_open, self._tensors = False, {}
