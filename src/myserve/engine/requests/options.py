"""The options of a request that are not about sampling: how many choices, in which order, for which client."""

from __future__ import annotations

from dataclasses import dataclass

from myserve.core.ranges import MAX_TOKENS, check_ranges, ranged
from myserve.errors import RequestError

__all__ = ["MAX_SAMPLES", "SubmitOptions"]

MAX_SAMPLES = 2**32  # sample indices of one seed: a word of the counter noise


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions:
    """Everything that `Engine.submit` takes beside the prompt and `SamplingParams`.

    Of these, `n`, `sample_index`, `num_prior_tokens`, `counts_prior_tokens` and `adapter` say which draws are made; the
    others say when, where and for whom, and change no token. Raises `RequestError` with the field, the value and the
    range.

    >>> SubmitOptions(n=4, client="alice").sample_index
    0
    >>> SubmitOptions(priority=2**40)
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: priority must be in [-2147483648, 2147483647], got 1099511627776
    """

    n: int = ranged(1, 1, 65536)
    """How many completions of the prompt; they share its prefill. >= 1; a server's routes allow fewer."""
    sample_index: int = ranged(0, 0, MAX_SAMPLES - 1)
    """Choice i draws with the noise of sample index `sample_index + i`; in [0, 2**32 - n]."""
    num_prior_tokens: int = ranged(0, 0, MAX_TOKENS)
    """So many ids at the prompt's end count as a completion already begun, fewer than the prompt has: penalties,
    constraints and torch noise go on as if it had never been cut off."""
    counts_prior_tokens: bool = False
    """`max_tokens` counts the prior tokens too: the request goes on under the parameters that it began with."""
    session: str = ""
    """The conversation that it belongs to: a fleet sends the requests of one to one replica, if it can."""
    request_id: str | None = None
    """The name in `RequestStream.request_id` and in messages; None: one is made."""
    priority: int = ranged(0, -(2**31), 2**31 - 1)
    """Lower runs first; requests of a higher number are preempted first."""
    client: str = ""
    """The client that asks: within a priority, clients are admitted in turns. Prefixes are shared within one client
    alone, unless `EngineConfig.share_prefix_cache` is set."""
    cache_salt: str = ""
    """Cached prefixes are found by requests of the same salt alone."""
    adapter: str | None = None
    """The name of a loaded adapter that the completions are drawn with; None: the model alone."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.sample_index > MAX_SAMPLES - self.n:
            raise RequestError(
                f"sample_index must be in [0, {MAX_SAMPLES} - n], got {self.sample_index} with n = {self.n}",
                param="sample_index",
            )
        for name in ("client", "cache_salt", "session", "request_id", "adapter"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name in ("request_id", "adapter") and value is None):
                raise RequestError(f"{name} must be a string, got {value!r:.80}", param=name)
