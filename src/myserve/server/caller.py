"""The current task's caller: the owner of the key and the time of arrival, set at the edge and read by generations."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["Caller", "begin", "current", "name_it"]


@dataclass(slots=True)
class Caller:
    """The caller of a request. Several keys of one owner are one caller."""

    # on the event loop's clock: a deadline counts from here, so the time that the body took counts too
    arrived: float
    # the key's owner; "" where no keys are needed
    name: str = ""
    # the conversation that the request names; "" where it names none
    session: str = ""


_current: ContextVar[Caller | None] = ContextVar("myserve_caller", default=None)


def begin(arrived: float) -> None:
    """Set the current task's caller, without a name yet."""
    _current.set(Caller(arrived))


def name_it(name: str) -> None:
    """Set the current caller's name, once its key was found; outside of a request, do nothing."""
    if (caller := _current.get()) is not None:
        caller.name = name


def current(now: float) -> Caller:
    """Return the current caller; outside of a request, one without a name that arrived `now`.

    >>> current(7.0)
    Caller(arrived=7.0, name='', session='')
    """
    return _current.get() or Caller(now)
