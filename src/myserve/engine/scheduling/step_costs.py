"""Predicts a step's seconds from those of earlier steps, and says how many prompt tokens fit beside running streams.

Pure arithmetic: seconds come in as numbers, no clock is read.
"""

from __future__ import annotations

__all__ = ["StepCosts", "padded_rows"]

# Without a target, a stream that decodes beside a prompt is slowed to this many times its own pace ...
SLOWDOWN = 3.0
# ... or as far as the prompt needs to keep this share of the speed that it has in the largest chunks.
PROMPT_SPEED = 0.9
MIN_PROMPT_TOKENS = 16
SMOOTHING = 0.2  # weight of the newest step
MAX_SURPRISE = (
    3.0  # a step that took longer than this many times its estimate counts as that long: a page fault, a GC
)


class StepCosts:
    """Learns what decodes and prompt tokens cost on this machine; bounds a step's prompt tokens by time.

    `target`: seconds between two tokens of a running stream; None: as `SLOWDOWN` and `PROMPT_SPEED` have it.

    >>> costs = StepCosts()
    >>> costs.prompt_tokens(decodes=8, most=256)  # nothing is known yet
    256
    >>> costs.observe(decodes=0, prompt_tokens=256, seconds=0.74)
    >>> costs.observe(decodes=8, prompt_tokens=0, seconds=0.045)
    >>> costs.prompt_tokens(decodes=8, most=256)
    88
    >>> StepCosts(target=0.1).prompt_tokens(8, 256)
    256
    """

    def __init__(self, target: float | None = None) -> None:
        self._target = target
        self._decode: dict[int, float] = {}  # bit length of the number of decodes -> seconds of such a step
        self._per_token: float | None = None  # seconds of one prompt token more

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """Take in what a step cost: `decodes` requests by one token, `prompt_tokens` beside them."""
        if not prompt_tokens:
            kind = decodes.bit_length()
            self._decode[kind] = _smoothed(self._decode.get(kind), seconds)
        elif prompt_tokens >= MIN_PROMPT_TOKENS:
            own = max(0.0, seconds - self._seconds_of_decodes(decodes))
            self._per_token = _smoothed(self._per_token, own / prompt_tokens)

    def prompt_tokens(self, decodes: int, most: int) -> int:
        """Return how many prompt tokens, at most `most`, a step with so many decodes should run.

        The rows of both together fill a recording (`padded_rows`), so that no row is computed for nothing.
        """
        base, per_token = self._seconds_of_decodes(decodes), self._per_token
        if not base or not per_token:
            return most
        if self._target is not None:
            fitting = (self._target - base) / per_token
        else:
            # c tokens run at c / (base + c * per_token); this c has PROMPT_SPEED of what `most` has
            fast = PROMPT_SPEED * most * base / (base + (1 - PROMPT_SPEED) * most * per_token)
            fitting = max((SLOWDOWN - 1) * base / per_token, fast)
        rows = padded_rows(decodes + max(MIN_PROMPT_TOKENS, int(fitting)))
        return min(most, rows - decodes)

    def _seconds_of_decodes(self, decodes: int) -> float:
        """Return the estimate for the nearest number that was seen; 0 where none was."""
        if not decodes or not self._decode:
            return 0.0
        kind = decodes.bit_length()
        return self._decode[min(self._decode, key=lambda seen: abs(seen - kind))]


def padded_rows(rows: int) -> int:
    """Return the rows of the recorded step that runs so many rows, not all of them decodes.

    >>> padded_rows(33), padded_rows(65)
    (48, 96)
    """
    grain = 16 if rows <= 64 else 32
    return -(-rows // grain) * grain


def _smoothed(estimate: float | None, value: float) -> float:
    if estimate is None:
        return value
    return estimate + SMOOTHING * (min(value, MAX_SURPRISE * estimate) - estimate)
