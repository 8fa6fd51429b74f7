"""Sessions on the wire: what each answer says of its own, and the whole trajectory."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from myserve.errors import RequestError

__all__ = [
    "SESSIONS",
    "SESSION_HEADERS",
    "Drift",
    "SessionAnswer",
    "SessionBody",
    "SessionBranch",
    "SessionTrajectory",
    "SessionTurn",
    "checked_session_id",
]

SESSIONS = "/v1/sessions"
MAX_SESSION_ID = 256  # characters

# The first that a request has counts. SkyRL, prime-rl, Ray Serve and OpenRouter; opencode and Fireworks; Claude Code;
# Codex, by both of its spellings.
SESSION_HEADERS = (
    "x-session-id",
    "x-session-affinity",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
)


class Drift(TypedDict):
    """A place where a conversation, rendered anew, is not what its session keeps, and what the model was given.

    `message` counts the request's messages from 0, null where it had none; `token` counts the ids of the prompt.
    """

    message: int | None
    token: int
    # retokenized: the same text as other ids; rerendered: the template writes the turn otherwise (thoughts, JSON);
    # edited: a message differs, is gone or is new; tools: tools, template arguments or the model differ;
    # template: the turn's end was not found among the rendered ids
    reason: Literal["retokenized", "rerendered", "edited", "tools", "template"]
    # kept: the ids of the session; sent: those of this request, so that the trajectory has a branch here
    used: Literal["kept", "sent"]


class SessionAnswer(TypedDict):
    """An answer's place in its session. The prompt is `kept_tokens` ids of earlier turns, and `new_tokens` behind."""

    id: str
    turn: (
        int | None
    )  # its number in the session; None: it was not kept, for there is no room, or it has no tokens
    continues: int | None  # the turn that it goes on from
    kept_tokens: int
    new_tokens: int
    drift: list[Drift]


class SessionTurn(TypedDict):
    """One answer: its sampled ids are [start, end) of its trajectory's."""

    turn: int
    request_id: str
    choice: int
    start: int
    end: int
    finish_reason: str
    seed: int
    drift: list[Drift]


class SessionBranch(TypedDict):
    """The first `tokens` ids of a trajectory are those of another one too, and have their loss there."""

    trajectory: int
    tokens: int


class SessionTrajectory(TypedDict):
    """One training sample: lists of one length. What was not sampled has null for its numbers, and no loss."""

    index: int
    model: str
    token_ids: list[int]
    loss_mask: list[int]  # 1: sampled by the model, in this context, and in no later trajectory of the list
    logprobs: list[float | None]  # of the raw logits
    sampling_logprobs: list[float | None]  # of the distribution that was drawn from
    weight_versions: list[int | None]
    adapter_versions: NotRequired[list[int | None]]  # where an adapter drew
    branch: SessionBranch | None
    retried: bool  # its last request was sent again, and nothing goes on from here
    turns: list[SessionTurn]


class SessionBody(TypedDict):
    """`GET /v1/sessions/{id}`. Times in unix seconds. The last trajectory is the one that was continued last."""

    id: str
    object: Literal["session"]
    created: int
    expires: int
    num_turns: int
    num_tokens: int  # of all trajectories that there are, sampled or not
    not_kept: int  # answers for which there was no room
    trajectories: list[SessionTrajectory]


def checked_session_id(name: str) -> str:
    """Return an id of a session. Raises RequestError.

    >>> checked_session_id("run 7/trajectory 3")
    'run 7/trajectory 3'
    """
    if len(name) > MAX_SESSION_ID or not (name.isascii() and name.isprintable()):
        raise RequestError(
            f"a session's id has at most {MAX_SESSION_ID} printable characters of ASCII", param="session_id"
        )
    return name
