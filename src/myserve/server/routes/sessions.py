"""Sessions: what was sampled over the turns of a conversation, as a trainer takes it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from myserve.errors import RequestError
from myserve.server import caller
from myserve.server.answers.size import check_size
from myserve.server.answers.streaming import WRITTEN_INLINE_BYTES, json_response, to_json_in_slices
from myserve.server.errors import NotFoundError
from myserve.server.routes.body import documented
from myserve.server.sessions.kept import KeptSession, KeptTurn
from myserve.server.sessions.store import Sessions
from myserve.server.sessions.trajectories import body_of, lasts, num_tokens
from myserve.wire.sessions import SESSIONS, SessionBody

__all__ = ["router"]

router = APIRouter()

JSON_BYTES = 64  # of one id with its numbers
TURN_JSON_BYTES = 512  # of what is said of a turn


@router.get(SESSIONS + "/{session_id:path}", openapi_extra=documented(answer=SessionBody))
async def show_session(http: Request, session_id: str) -> Response:
    """Return a session's trajectories; `?trajectory=` one of them, -1 the last."""
    session = _session(http, session_id)
    sessions: Sessions = http.app.state.sessions
    only = _trajectory_of(http, ends := lasts(session))
    shown = ends if only is None else [ends[only]]
    size = JSON_BYTES * num_tokens(shown) + TURN_JSON_BYTES * sum(turn.depth + 1 for turn in shown)
    check_size(size, num_tokens(shown), advice="ask for one at a time with ?trajectory=")

    def body() -> SessionBody:
        return body_of(session, ends, sessions.timeout, only)

    is_large = size > WRITTEN_INLINE_BYTES
    return json_response(await asyncio.to_thread(lambda: to_json_in_slices(body())) if is_large else body())


@router.delete(SESSIONS + "/{session_id:path}")
async def delete_session(http: Request, session_id: str) -> Response:
    """Forget a session. What its requests in flight bring is not kept either."""
    session = _session(http, session_id)
    sessions: Sessions = http.app.state.sessions
    sessions.delete(session.owner, session.id)
    return json_response({"id": session.id, "object": "session.deleted", "deleted": True})


def _session(http: Request, session_id: str) -> KeptSession:
    sessions: Sessions = http.app.state.sessions
    session = sessions.get(caller.current(0.0).name, session_id)
    if session is None:
        raise NotFoundError(
            f"there is no session {session_id[:80]!r} of this key: none was begun, it was deleted, nobody used it for "
            f"{sessions.timeout:g} s, it made room for others, or the server was restarted",
            code="session_not_found",
        )
    return session


def _trajectory_of(http: Request, ends: list[KeptTurn]) -> int | None:
    asked = http.query_params.get("trajectory")
    if asked is None:
        return None
    try:
        return range(len(ends))[int(asked)]
    except (ValueError, IndexError):
        raise RequestError(
            f"trajectory must be the index of one of the {len(ends)} that there are, got {asked[:20]!r}",
            param="trajectory",
        ) from None
