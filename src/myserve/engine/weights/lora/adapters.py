"""The adapters of one engine: which version each name means, and which are still in memory for requests that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import count

from myserve.engine.batch_invariance.low_rank import AdapterSlots, LowRankLayer
from myserve.engine.scheduling.adapter import AdapterVersion
from myserve.engine.weights.lora.adapter_files import PreparedAdapter
from myserve.errors import ModelNotFoundError, RequestError

__all__ = ["Adapters", "already_loaded"]


class Adapters:
    """Loaded adapters by name. The engine's thread changes them, between two steps; any thread may read `current`.

    A version leaves the memory when its name means another, or nothing, and no request that has begun with it is left.
    """

    def __init__(self) -> None:
        self.slots = AdapterSlots()
        self._layers: list[LowRankLayer] = []  # those that an adapter has ever changed
        # replaced as a whole, never changed
        self.current: Mapping[str, AdapterVersion] = {}
        self._used_by: Counter[AdapterVersion] = Counter()  # requests that have not ended
        self._in_memory: dict[int, AdapterVersion] = {}  # by slot
        self._versions = count(1)

    def find(self, name: str) -> AdapterVersion:
        """Return the version that a name means now. Raises ModelNotFoundError."""
        version = self.current.get(name)
        if version is None:
            raise ModelNotFoundError(f"the adapter {name[:200]!r} is not loaded")
        return version

    def put(
        self, name: str, prepared: PreparedAdapter, *, path: str = "", replaces: bool = True
    ) -> tuple[AdapterVersion, AdapterVersion | None, bool]:
        """Put an adapter in place; return its version, the one before it, and whether recorded steps are void.

        Raises RequestError where there is one of the name and `replaces` is False.
        """
        old = self.current.get(name)
        if old is not None and not replaces:
            raise already_loaded(name)
        slot = next(slot for slot in count() if slot not in self._in_memory)
        version = AdapterVersion(
            name, next(self._versions), slot, prepared.rank, prepared.num_bytes, prepared.checksum, path
        )
        is_void = self.slots.make_room(slot, prepared.rank)
        if is_void:
            for layer in self._layers:
                layer.resize()
        for target, weights in prepared.changes:
            layer = getattr(target.module, target.attribute)
            if layer is None:
                sizes = target.in_features, target.out_features
                layer = LowRankLayer(self.slots, *sizes, target.dtype, max(1, target.experts))
                setattr(target.module, target.attribute, layer)
                self._layers.append(layer)
                is_void = True
            layer.put(slot, weights)
        self._in_memory[slot] = version
        self.current = {**self.current, name: version}
        if old is not None:
            self._drop_if_unused(old)
        return version, old, is_void

    def remove(self, name: str) -> AdapterVersion:
        """Take a name away; requests that have begun with it go on to their ends. Raises ModelNotFoundError."""
        old = self.find(name)
        self.current = {other: version for other, version in self.current.items() if other != name}
        self._drop_if_unused(old)
        return old

    def begin(self, version: AdapterVersion, requests: int = 1) -> None:
        """Count requests that compute with a version from now on."""
        self._used_by[version] += requests

    def end(self, version: AdapterVersion) -> None:
        """Count one less."""
        self._used_by[version] -= 1
        if not self._used_by[version]:
            del self._used_by[version]
            self._drop_if_unused(version)

    def close(self) -> None:
        """Let go of all weights: nothing computes any more."""
        self.current = {}
        self._layers.clear()

    def _drop_if_unused(self, version: AdapterVersion) -> None:
        if self.current.get(version.name) is version or version in self._used_by:
            return
        if self._in_memory.get(version.slot) is version:
            del self._in_memory[version.slot]
            for layer in self._layers:
                layer.drop(version.slot)


def already_loaded(name: str) -> RequestError:
    """Return the error of a load that would replace, and was not asked to."""
    return RequestError(
        f"the adapter {name[:200]!r} is loaded already: set load_inplace to replace it, or unload it first",
        param="lora_name",
    )
