"""The fleet's journal in Ray's own store, which outlives the controller: its death takes nothing of it."""

from __future__ import annotations

from ray.experimental import internal_kv

__all__ = ["RayStore"]

NAMESPACE = "myserve"


class RayStore:
    """One value of a fleet in Ray's key-value store, in which Serve keeps its own state too. Ray must be connected."""

    def __init__(self, fleet: str) -> None:
        self._key = f"fleet-{fleet}"

    def read(self) -> bytes | None:
        """Return what was written; None where nothing was."""
        found: bytes | None = internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
        return found

    def write(self, body: bytes) -> None:
        """Put a value in place of the one before."""
        internal_kv._internal_kv_put(self._key, body, overwrite=True, namespace=NAMESPACE)
