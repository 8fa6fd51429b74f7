"""The current task's caller: the owner of the key and the time of arrival, set at the edge and read by generations."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["BATCH_PRIORITY", "Caller", "begin", "begin_batch", "current", "name_it"]

# no request that names no priority of its own waits for what has this one; a batch may ask for less, but not for more
BATCH_PRIORITY = 1 << 20


@dataclass(slots=True)
class Caller:
    """The caller of a request. Several keys of one owner are one caller."""

    # on the event loop's clock: a deadline counts from here, so the time that the body took counts too
    arrived: float
    # the key's owner; "" where no keys are needed
    name: str = ""
    # the conversation that the request names; "" where it names none
    session: str = ""
    # it asks for a batch, which gives way to all who wait for their answers
    is_batch: bool = False

    def priority(self, asked: int | None) -> int:
        """Return the engine's priority of a request that asks for one; a lower number goes first.

        >>> Caller(0.0).priority(None), Caller(0.0, is_batch=True).priority(-5)
        (0, 1048576)
        """
        return max(asked or 0, BATCH_PRIORITY) if self.is_batch else asked or 0


_current: ContextVar[Caller | None] = ContextVar("myserve_caller", default=None)


def begin(arrived: float) -> None:
    """Set the current task's caller, without a name yet."""
    _current.set(Caller(arrived))


def begin_batch(arrived: float, name: str) -> None:
    """Set the current task's caller: a batch of `name`'s."""
    _current.set(Caller(arrived, name, is_batch=True))


def name_it(name: str) -> None:
    """Set the current caller's name, once its key was found; outside of a request, do nothing."""
    if (caller := _current.get()) is not None:
        caller.name = name


def current(now: float) -> Caller:
    """Return the current caller; outside of a request, one without a name that arrived `now`.

    >>> current(7.0)
    Caller(arrived=7.0, name='', session='', is_batch=False)
    """
    return _current.get() or Caller(now)
