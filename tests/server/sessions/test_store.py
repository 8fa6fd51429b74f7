"""Sessions are their owners', bounded together, and one that a request holds is not lost to others' room."""

from __future__ import annotations

from myserve.server.sessions.store import SESSION_BYTES, Sessions


def grow(sessions: Sessions, owner: str, name: str, num_bytes: int) -> bool:
    session = sessions.begin(owner, name)
    if not sessions.make_room(session, num_bytes):
        return False
    session.num_bytes += num_bytes
    sessions.has_grown(session, num_bytes)
    return True


def test_room_is_made_by_the_owner_who_has_most_and_then_by_anyone() -> None:
    sessions = Sessions(timeout=60, most_bytes=5 * SESSION_BYTES, now=lambda: 0.0)
    for name in "abc":
        sessions.begin("alice", name)
    sessions.begin("bob", "b")
    sessions.begin("alice", "a")  # used again
    assert grow(sessions, "bob", "b", 2 * SESSION_BYTES)
    assert [sessions.get("alice", name) is not None for name in "abc"] == [True, False, True]
    assert not grow(sessions, "bob", "b", 5 * SESSION_BYTES), "not alone, either"
    assert len(sessions) == 3 and sessions.get("bob", "b") is not None


def test_one_that_made_room_while_its_request_ran_is_there_again_when_it_ends() -> None:
    sessions = Sessions(timeout=60, most_bytes=2 * SESSION_BYTES, now=lambda: 0.0)
    held = sessions.begin("alice", "a")
    sessions.begin("alice", "b")
    sessions.begin("alice", "c")
    assert sessions.get("alice", "a") is None
    assert sessions.make_room(held, 0) and sessions.get("alice", "a") is held
    # but not in the place of a new one, nor where it was deleted
    sessions.delete("alice", "a")
    assert not sessions.make_room(held, 0)
    other = sessions.begin("alice", "b")
    sessions.begin("alice", "c")
    sessions.begin("alice", "d")
    assert sessions.begin("alice", "b") is not other and not sessions.make_room(other, 0)


def test_the_bytes_are_counted_to_nothing() -> None:
    clock = [0.0]
    sessions = Sessions(timeout=60, most_bytes=9 * SESSION_BYTES, now=lambda: clock[0])
    for _ in range(50):
        assert grow(sessions, "alice", "a", SESSION_BYTES)
        sessions.delete("alice", "a")
    grow(sessions, "bob", "b", 8 * SESSION_BYTES)
    clock[0] = 61.0
    assert grow(sessions, "carol", "c", 8 * SESSION_BYTES) and len(sessions) == 1
