"""Records which weights made which tokens of one sample, over as many attempts as it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["VersionLog"]


class VersionLog:
    """Record a sample's weight versions, token by token.

    A sample that is cut and resumed goes on with keys and values that the resuming request computes anew, all by the
    weights of its time: where older ones had made some of them, the span says `recomputed`.

    >>> log = VersionLog()
    >>> log.feed(3, 0)
    >>> log.begin(3)
    >>> log.feed(5, 1)
    >>> log.spans()[-1]
    {'start': 3, 'end': 5, 'weight_version': 1, 'recomputed': True}
    """

    def __init__(self) -> None:
        self._versions: list[int | None] = []
        self._recomputed: set[int] = set()
        self._start = 0  # of this attempt

    def begin(self, num_prior: int) -> None:
        """Begin an attempt that goes on from `num_prior` tokens."""
        if self._start < num_prior and self._is_resumed_by_others(self._start):
            self._recomputed.add(self._start)
        del self._versions[num_prior:]
        self._recomputed = {position for position in self._recomputed if position < num_prior}
        self._start = num_prior

    def feed(self, num_tokens: int, version: int | None) -> None:
        """Note that the sample has `num_tokens` tokens now, the new ones made by `version`."""
        self._versions += [version] * (num_tokens - len(self._versions))

    def correct(self, spans: Iterable[Mapping[str, Any]]) -> bool:
        """Take the server's own account of the attempt's tokens, where a chunk had tokens of two versions.

        Returns False, and takes no more, when a span lies outside of the tokens.
        """
        for span in spans:
            first, last = self._start + span["start"], self._start + span["end"]
            if not self._start <= first < last <= len(self._versions):
                return False
            self._versions[first:last] = [span["weight_version"]] * (last - first)
            if span.get("recomputed"):
                self._recomputed.add(first)
        return True

    def spans(self) -> list[dict[str, int]] | None:
        """Return half-open intervals; None where one version made all, or the server does not say."""
        if None in self._versions or not self._versions:
            return None
        spans: list[dict[str, int]] = []
        for position, version in enumerate(self._versions):
            assert version is not None
            recomputed = position in self._recomputed or self._is_resumed_by_others(position)
            if not spans or spans[-1]["weight_version"] != version or recomputed:
                spans.append({"start": position, "end": position, "weight_version": version})
                if recomputed:
                    spans[-1]["recomputed"] = True
            spans[-1]["end"] = position + 1
        return spans if len(spans) > 1 else None

    def _is_resumed_by_others(self, position: int) -> bool:
        if not 0 < self._start == position < len(self._versions):
            return False
        return any(version != self._versions[position] for version in self._versions[:position])
