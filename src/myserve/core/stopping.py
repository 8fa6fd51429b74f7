"""The ends of a completion: stop strings in its text, and the ids that end it.

Law of the text: what has been released can no longer be part of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Released", "StopIds", "StopMatcher"]


class Released(NamedTuple):
    """The text that can no longer be part of a stop string, and the stop string that ended it, if one did."""

    text: str
    matched: str | None


class StopMatcher:
    """Finds the first of several stop strings in text that arrives in pieces of any size.

    It holds back the longest suffix that some stop string begins with; all else is released at once, `released`
    characters so far. Of strings that match, the one that ends first wins, the longest of those
    that end at the same character: what one finds who reads one character at a time, so that the
    pieces in which the text arrives never matter.

    >>> matcher = StopMatcher(["</s>", "END"])
    >>> matcher.feed("one <")
    Released(text='one ', matched=None)
    >>> matcher.feed("b> E")
    Released(text='<b> ', matched=None)
    >>> matcher.feed("ND of it"), matcher.released
    (Released(text='', matched='END'), 8)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest_prefixes = {stop: _borders(stop) for stop in self._stops}
        self._state = dict.fromkeys(self._stops, 0)  # how many characters of each stop the text now ends with
        self._held = ""
        self.released = 0
        self.matched: str | None = None

    def feed(self, text: str) -> Released:
        """Take in more text; nothing more is released, whatever is fed, once a stop string has matched."""
        if self.matched is not None:
            return Released("", self.matched)
        for read, character in enumerate(text, 1):
            ended = [stop for stop in self._stops if self._advance(stop, character)]
            if ended:
                return self._match(max(ended, key=len), self._held + text[:read])
        self._held += text
        return Released(self._release(len(self._held) - max(self._state.values(), default=0)), None)

    def flush(self) -> str:
        """Release what is held back: the text has ended, and no stop string came of it."""
        return self._release(len(self._held))

    def _advance(self, stop: str, character: str) -> bool:
        """Knuth, Morris and Pratt's step; True when the text now ends with `stop`."""
        borders = self._longest_prefixes[stop]
        length = self._state[stop]
        while length and (length == len(stop) or stop[length] != character):
            length = borders[length]
        self._state[stop] = length = length + (stop[length] == character)
        return length == len(stop)

    def _match(self, stop: str, text: str) -> Released:
        # the stop string lies in the held text whole: a beginning of it was never released
        self.matched = stop
        self._held = text[: len(text) - len(stop)]
        return Released(self.flush(), stop)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self.released += len(text)
        return text


def _borders(stop: str) -> list[int]:
    """borders[n]: the longest proper prefix of stop[:n] that is also its suffix."""
    borders = [0, 0]
    for end in range(1, len(stop)):
        length = borders[end]
        while length and stop[length] != stop[end]:
            length = borders[length]
        borders.append(length + (stop[length] == stop[end]))
    return borders


class StopIds:
    """The ids that end a completion, and the `stop_reason` of each: None for EOS, the id for a caller's own.

    >>> ends = StopIds(eos_token_ids=[2], stop_token_ids=[7], ignore_eos=False)
    >>> 2 in ends, 7 in ends, 5 in ends, ends.reason(2), ends.reason(7)
    (True, True, False, None, 7)
    """

    def __init__(
        self, *, eos_token_ids: Sequence[int], stop_token_ids: Sequence[int], ignore_eos: bool
    ) -> None:
        self._asked_for = frozenset(stop_token_ids)
        self._ends = self._asked_for if ignore_eos else self._asked_for | frozenset(eos_token_ids)

    def __contains__(self, token_id: object) -> bool:
        return token_id in self._ends

    def reason(self, token_id: int) -> int | None:
        """Return the id, if the caller asked for it as a stop id; None for an EOS."""
        return token_id if token_id in self._asked_for else None
