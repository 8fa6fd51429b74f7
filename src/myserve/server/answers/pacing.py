"""Several tokens share a chunk, for what a stream's JSON costs is a chunk's envelope, not its tokens."""

from __future__ import annotations

from msgspec.structs import replace

from myserve.engine.outputs import Delta

__all__ = ["DeltaPacer", "merged"]


class DeltaPacer:
    """Holds one choice's deltas back until they have `interval` tokens; its first and its last never wait.

    >>> pace = DeltaPacer(3)
    >>> [pace.take(Delta(0, text)) is None for text in "ab"]
    [False, False]
    >>> from myserve.engine.outputs import TokenOutput
    >>> deltas = [Delta(0, text, (TokenOutput(1, 0.0, 0.0),)) for text in "cdefg"]
    >>> [merged and merged.text for merged in map(pace.take, deltas)]
    ['c', None, None, 'def', None]
    >>> pace.take(Delta(0, finish_reason="length")).text
    'g'
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._begun = False
        self._held: Delta | None = None

    def take(self, delta: Delta) -> Delta | None:
        """Return all that is held, with `delta`, if it is to be sent now."""
        if self._held is not None:
            delta = merged(self._held, delta)
        waits = self._begun and delta.finish_reason is None and len(delta.tokens) < self._interval
        self._begun = self._begun or bool(delta.tokens)
        self._held = delta if waits else None
        return None if waits else delta


def merged(first: Delta, then: Delta) -> Delta:
    """Return two deltas of one choice as one."""
    return replace(
        then,
        text=first.text + then.text,
        tokens=first.tokens + then.tokens,
        stop_tokens=first.stop_tokens + then.stop_tokens,
        prompt_logprobs=first.prompt_logprobs if then.prompt_logprobs is None else then.prompt_logprobs,
    )
