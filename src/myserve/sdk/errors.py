"""Errors of the SDK: each names the sample, the attempts, the HTTP status, and the server's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from myserve.errors import MyserveError

__all__ = ["AttemptFailed", "Failure", "FailureKind", "SamplingDeadlineError", "SamplingError"]

FailureKind = Literal["refused", "busy", "server", "transport", "protocol", "mismatch", "deadline"]

_WHOSE = {
    "refused": "the request was refused (the request's fault; asking again would not help)",
    "busy": "the server was too busy",
    "server": "the server failed",
    "transport": "the connection failed",
    "protocol": "the server's answer broke the protocol",
    "mismatch": "the server answered another request than was sent (asking again would not help)",
    "deadline": "the deadline passed",
}

# Seconds: a longer Retry-After is taken as this one, for a server must not be able to stop a run.
_LONGEST_RETRY_AFTER = 600.0
# 425: weights are loading. 409: a deployment that is being updated. Neither is the request's fault.
_BUSY = frozenset({408, 409, 425, 429, 503})


@dataclass(frozen=True, slots=True)
class Failure:
    """Hold why one attempt failed, in the server's own words where it had any.

    >>> Failure.of_status(404, "no model 'gpt-9'").retryable
    False
    >>> Failure.of_status(503, "queue full", {"retry-after": "2"}).retry_after
    2.0
    """

    kind: FailureKind
    message: str
    status: int | None = None
    retry_after: float | None = None  # seconds, as the server asked

    @property
    def retryable(self) -> bool:
        """False for what would fail again in the same way, and for a deadline."""
        return self.kind not in ("refused", "mismatch", "deadline")

    @classmethod
    def of_status(cls, status: int, message: str, headers: Mapping[str, str] | None = None) -> Failure:
        """Classify an HTTP status: 408, 409, 425, 429 and 503 are "busy", other 5xx "server", all others "refused"."""
        kind: FailureKind = "busy" if status in _BUSY else "server" if status >= 500 else "refused"
        return cls(kind, message, status, _seconds((headers or {}).get("retry-after")))


class SamplingError(MyserveError, RuntimeError):
    """One sample could not be had. `index`, `attempts`, `status` and `server_message` say which, and why.

    >>> print(SamplingError(Failure("refused", "no model 'gpt-9'", 404), index=3, attempts=1))
    sample 3: the request was refused (the request's fault; asking again would not help) \
after 1 attempt, HTTP 404: no model 'gpt-9'
    """

    def __init__(self, failure: Failure, *, index: int, attempts: int) -> None:
        self.failure = failure
        self.index = index
        self.attempts = attempts
        tries = f"after {attempts} attempt{'' if attempts == 1 else 's'}"
        super().__init__(f"sample {index}: {_WHOSE[failure.kind]} {tries}{_with_status(failure)}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from their message; ours has keywords. Samplers run in worker processes.
        return _rebuilt, (type(self), self.failure, self.index, self.attempts)

    @property
    def status(self) -> int | None:
        """Return the HTTP status of the last attempt; None when there was no answer."""
        return self.failure.status

    @property
    def server_message(self) -> str:
        """Return the message of the last attempt: the server's, or the operating system's."""
        return self.failure.message

    @property
    def retryable(self) -> bool:
        """Return whether asking again later may help."""
        return self.failure.retryable


class SamplingDeadlineError(SamplingError, TimeoutError):
    """The call's overall deadline passed before this sample was whole."""


def _with_status(failure: Failure) -> str:
    status = "" if failure.status is None else f", HTTP {failure.status}"
    return f"{status}: {failure.message}"


def _rebuilt(kind: type[SamplingError], failure: Failure, index: int, attempts: int) -> SamplingError:
    return kind(failure, index=index, attempts=attempts)


class AttemptFailed(Exception):  # noqa: N818  # never leaves the SDK: what one attempt ends with, not an error of a call
    """One attempt ended early; `retry.py` decides what that means."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _seconds(text: str | None) -> float | None:
    """Return Retry-After in seconds, at most ten minutes. A date is left to the backoff: clocks differ."""
    try:
        seconds = float(text) if text is not None else None
    except ValueError:
        return None
    return min(seconds, _LONGEST_RETRY_AFTER) if seconds is not None and 0 <= seconds < 86_400 else None
