"""After a fork, a child process starts with no event loop, no connections and nothing in flight.

Threads do not survive `os.fork`: a child that kept its parent's locks, event loops and sockets would wait for threads
that it does not have. What holds such things is registered here, and made anew in the child.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["reset_after_fork"]


class _Resettable(Protocol):
    def _after_fork(self) -> None: ...


_registered: weakref.WeakSet[_Resettable] = weakref.WeakSet()


def reset_after_fork(holder: _Resettable) -> None:
    """Call `holder._after_fork()` in every child that this process forks, for as long as `holder` lives."""
    _registered.add(holder)


def _reset_all() -> None:
    for holder in list(_registered):
        holder._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
