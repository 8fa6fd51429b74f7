"""A session's turns as training samples: each sampled token has its loss once, and every list has one length."""

from __future__ import annotations

from collections.abc import Sequence

from myserve.server.sessions.kept import KeptSession, KeptTurn
from myserve.wire.sessions import SessionBody, SessionBranch, SessionTrajectory, SessionTurn

__all__ = ["body_of", "lasts", "num_tokens"]


def body_of(
    session: KeptSession, ends: Sequence[KeptTurn], timeout: float, only: int | None = None
) -> SessionBody:
    """Return the whole session, or its trajectory `only`. `ends` are its `lasts`, from before it grew further."""
    scored_in, requests = _scored_in(ends), _last_requests(session)
    chosen = range(len(ends)) if only is None else [only]
    return {
        "id": session.id,
        "object": "session",
        "created": int(session.created),
        "expires": int(session.used + timeout),
        "num_turns": len(session.turns),
        "num_tokens": num_tokens(ends),
        "not_kept": session.num_not_kept,
        "trajectories": [_trajectory(index, ends[index], scored_in, requests) for index in chosen],
    }


def lasts(session: KeptSession) -> list[KeptTurn]:
    """Return the turns from which nothing goes on, in the order of their ends: each ends a trajectory."""
    return [turn for turn in session.turns if not turn.is_continued]


def num_tokens(ends: Sequence[KeptTurn]) -> int:
    """Return how many ids the trajectories have that end there."""
    return sum(turn.end for turn in ends)


def _scored_in(ends: Sequence[KeptTurn]) -> dict[int, int]:
    """Return the last trajectory of each turn, by the turn's number."""
    found: dict[int, int] = {}
    for index in range(len(ends) - 1, -1, -1):
        turn: KeptTurn | None = ends[index]
        while turn is not None and turn.number not in found:
            found[turn.number] = index
            turn = turn.parent
    return found


def _last_requests(session: KeptSession) -> dict[bytes, str]:
    """Return the id of the last request with each prompt."""
    return {turn.prompt: turn.request_id for turn in session.turns}


def _trajectory(
    index: int, last: KeptTurn, scored_in: dict[int, int], requests: dict[bytes, str]
) -> SessionTrajectory:
    path = last.path
    made: SessionTrajectory = {
        "index": index,
        "model": last.model,
        "token_ids": last.token_ids,
        "loss_mask": [],
        "logprobs": [],
        "sampling_logprobs": [],
        "weight_versions": [],
        "branch": _branch(index, path, scored_in),
        "retried": requests[last.prompt] != last.request_id,
        "turns": [_turn(turn) for turn in path],
    }
    adapters: list[int | None] = []
    for turn in path:
        given: list[None] = [None] * len(turn.new)
        made["loss_mask"] += [0] * len(turn.new) + [int(scored_in[turn.number] == index)] * len(turn.sampled)
        made["logprobs"] += [*given, *turn.logprobs]
        made["sampling_logprobs"] += [*given, *turn.sampling_logprobs]
        made["weight_versions"] += [*given, *turn.weight_versions]
        versions = turn.adapter_versions or [-1] * len(turn.sampled)
        adapters += [*given, *(None if version < 0 else version for version in versions)]
    if any(turn.adapter_versions for turn in path):
        made["adapter_versions"] = adapters
    return made


def _branch(index: int, path: Sequence[KeptTurn], scored_in: dict[int, int]) -> SessionBranch | None:
    shared = [turn for turn in path if scored_in[turn.number] != index]
    return {"trajectory": scored_in[shared[-1].number], "tokens": shared[-1].end} if shared else None


def _turn(turn: KeptTurn) -> SessionTurn:
    return {
        "turn": turn.number,
        "request_id": turn.request_id,
        "choice": turn.choice,
        "start": turn.start,
        "end": turn.end,
        "finish_reason": turn.finish_reason,
        "seed": turn.seed,
        "drift": list(turn.drift),
    }
