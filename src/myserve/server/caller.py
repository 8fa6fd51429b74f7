"""Whose request the current task answers, and since when: the edge knows, and a generation asks."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Caller:
    """Who asked. Several keys of one owner are one caller."""

    arrived: float  # on the event loop's clock: a deadline counts from here, so the body's way counts too
    name: str = ""  # the key's owner; "" where no keys are wanted


_current: ContextVar[Caller | None] = ContextVar("myserve_caller", default=None)


def begin(arrived: float) -> None:
    """The current task begins to answer a request."""
    _current.set(Caller(arrived))


def name_it(name: str) -> None:
    """Its key was found good. Outside of any request, nothing happens."""
    if (caller := _current.get()) is not None:
        caller.name = name


def current(now: float) -> Caller:
    """The current request's; outside of any, nobody's, who has come just now.

    >>> current(7.0)
    Caller(arrived=7.0, name='')
    """
    return _current.get() or Caller(now)
