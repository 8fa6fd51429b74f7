"""The sessions of one server: each its owner's alone, forgotten when nobody used it for a while or there is no room."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

from starlette.datastructures import Headers

from myserve.server.sessions.kept import KeptSession
from myserve.wire.sessions import SESSION_HEADERS, checked_session_id

__all__ = ["SESSION_BYTES", "Sessions", "session_id_of", "session_named"]

SESSION_BYTES = 4096  # of a session without its turns

Key = tuple[str, str]  # owner, id


def session_id_of(headers: Headers) -> str | None:
    """Return the id of the session that a request names; None: it names none. Raises RequestError.

    >>> session_id_of(Headers({"X-Session-ID": "rollout-3", "session_id": "other"}))
    'rollout-3'
    """
    return checked_session_id(name) if (name := session_named(headers)) else None


def session_named(headers: Headers) -> str:
    """Return what a request's headers call its session, good or not; "" where they name none."""
    return next((value for header in SESSION_HEADERS if (value := headers.get(header))), "")


class Sessions:
    """Hold the sessions by owner and id. Used on the event loop alone.

    What nobody used for `timeout` seconds is forgotten. All together have `most_bytes` at most: the owner who has the
    most loses the session that was not used for the longest time. `now`: unix seconds.

    >>> clock = [0.0]
    >>> sessions = Sessions(timeout=60, most_bytes=10_000, now=lambda: clock[0])
    >>> sessions.begin("alice", "a") is sessions.begin("alice", "a"), sessions.get("bob", "a")
    (True, None)
    >>> clock[0] = 61.0
    >>> sessions.get("alice", "a") is None
    True
    """

    def __init__(self, *, timeout: float, most_bytes: int, now: Callable[[], float] = time.time) -> None:
        self.timeout = timeout
        self._most_bytes = most_bytes
        self._now = now
        self._held: dict[Key, KeptSession] = {}  # that which was used last is the last
        self._num_bytes: Counter[str] = Counter()  # by owner

    def __len__(self) -> int:
        return len(self._held)

    @property
    def are_kept(self) -> bool:
        """Return whether there are any."""
        return self._most_bytes > 0

    def get(self, owner: str, name: str) -> KeptSession | None:
        """Return a session, if it is there and `owner`'s."""
        self._expire()
        return self._held.get((owner, name))

    def begin(self, owner: str, name: str) -> KeptSession:
        """Return the session that a request names, a new one where there is none, as used now."""
        self._expire()
        key, now = (owner, name), self._now()
        session = self._held.pop(key, None) or KeptSession(name, owner, created=now, used=now)
        if not session.num_bytes:
            session.num_bytes = SESSION_BYTES
            self._num_bytes[owner] += SESSION_BYTES
        session.used = now
        self._held[key] = session
        self._make_room(0, session)
        return session

    def make_room(self, session: KeptSession, num_bytes: int) -> bool:
        """Return whether a session may have so many bytes more; others are forgotten for it."""
        key = session.owner, session.id
        if self._held.get(key, session) is not session or session.is_deleted:
            return False
        if key not in self._held:  # it made room for others meanwhile
            self._num_bytes[session.owner] += session.num_bytes
        self._held.pop(key, None)
        session.used = self._now()
        self._held[key] = session
        # what has no room alone costs no other its own
        return session.num_bytes + num_bytes <= self._most_bytes and self._make_room(num_bytes, session)

    def has_grown(self, session: KeptSession, num_bytes: int) -> None:
        """Count bytes that a session has taken."""
        self._num_bytes[session.owner] += num_bytes

    def delete(self, owner: str, name: str) -> bool:
        """Forget a session, and what its requests in flight bring; return whether it was there."""
        session = self.get(owner, name)
        if session is not None:
            session.is_deleted = True
            self._forget(session)
        return session is not None

    def _make_room(self, num_bytes: int, keeping: KeptSession) -> bool:
        while self._num_bytes.total() + num_bytes > self._most_bytes:
            owner = max(self._num_bytes, key=lambda name: self._num_bytes[name])
            oldest = next(self._of(owner, but=keeping), None) or next(self._of(None, but=keeping), None)
            if oldest is None:
                return False
            self._forget(oldest)
        return True

    def _of(self, owner: str | None, *, but: KeptSession) -> Iterator[KeptSession]:
        """Yield an owner's sessions, or all; the one that was not used for the longest time first."""
        return (s for s in self._held.values() if s is not but and owner in (None, s.owner))

    def _expire(self) -> None:
        before = self._now() - self.timeout
        while self._held and (oldest := next(iter(self._held.values()))).used < before:
            self._forget(oldest)

    def _forget(self, session: KeptSession) -> None:
        self._held.pop((session.owner, session.id), None)
        self._num_bytes[session.owner] -= session.num_bytes
        if self._num_bytes[session.owner] <= 0:
            del self._num_bytes[session.owner]
