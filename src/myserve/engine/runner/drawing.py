"""Draws a step's tokens: one for each request, and as many more as its draft has right.

A drafted token is verified by drawing: its position is drawn from its own logits, with its own noise, by a sampling
state that has taken in the tokens before it and nothing else. Where the drawn token is the drafted one, the next
position's logits are those that a step of its own would have given, and it is drawn in turn. Where it is another, it is
the right token all the same, and what lies behind it is dropped. So nothing is ever taken back: penalties, grammars,
budgets and generators see drawn tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice

from torch import Tensor

from myserve.core.isolation import failure_of
from myserve.core.rows import RowState
from myserve.core.sampling import Outcome, Sampled
from myserve.engine.scheduling.batch import Batch

__all__ = ["draw_tokens", "drawn_positions", "forced_by"]

# of logits [wanted, V], sampling states, and which of the logits each has
Sample = Callable[[Tensor, Sequence[RowState], Sequence[int]], list[Outcome]]


def drawn_positions(batch: Batch) -> list[range]:
    """For each draw, the packed rows that it may be drawn from: the last of its part, and those of its draft."""
    ends: list[int] = []
    end = 0
    for part in batch.scheduled:
        end += part.count
        ends.append(end)
    return [range(ends[i] - 1 - len(batch.scheduled[i].draft), ends[i]) for _, i in batch.draws]


def draw_tokens(
    batch: Batch,
    logits: Tensor,
    row_of: dict[int, int],
    rows: Sequence[RowState],
    sample: Sample,
    at_once: int = 1,
) -> list[list[Outcome]]:
    """Draw for each of the batch's draws, and append to `rows`, their sampling states.

    `logits` [wanted, V]; `row_of`: which of its rows a packed row has. A list of outcomes ends with the first token
    that no draft had, with the end of the completion, or with an error. `at_once`: rows that are drawn in the time of
    one; where fewer requests go on, the next positions of those that remember no tokens are drawn with them. Of drafts
    that were right so far twice as many are drawn each time.
    """
    positions = drawn_positions(batch)
    drawn: list[list[Outcome]] = [[] for _ in rows]
    going, width = list(range(len(rows))), 1
    while going:
        width = max(width, at_once // len(going))
        picked: list[int] = []
        states: list[RowState] = []
        counts: list[int] = []
        for i in going:
            left = positions[i][len(drawn[i]) :]
            left = left[: 1 if rows[i].remembers else width]
            picked += [row_of[position] for position in left]
            states += [rows[i], *(rows[i].ahead(tokens) for tokens in range(1, len(left)))]
            counts.append(len(left))
        width *= 2
        outcomes = iter(sample(logits, states, picked))
        going = [
            i
            for i, count in zip(going, counts, strict=True)
            if _take(batch, i, rows[i], drawn[i], list(islice(outcomes, count)))
        ]
    return drawn


def _take(batch: Batch, draw: int, row: RowState, drawn: list[Outcome], outcomes: list[Outcome]) -> bool:
    """Take a draw's next outcomes up to the first that the draft has not; whether the draft has them all."""
    for outcome in outcomes:
        outcome = _appended(row, outcome)
        drawn.append(outcome)
        if not isinstance(outcome, Sampled) or not _is_right(batch, draw, len(drawn) - 1, outcome.token_id):
            return False
    return True


def forced_by(row: RowState) -> tuple[int, ...]:
    """Return the tokens that a row's constraint forces next; none where it fails, which its next draw will tell."""
    with suppress(Exception):
        if row.constraint is not None:
            return tuple(row.constraint.forced_token_ids())
    return ()


def _is_right(batch: Batch, draw: int, depth: int, token_id: int) -> bool:
    """Return whether the draft has this token there, and the completion goes on behind it."""
    request, part = batch.draws[draw]
    draft = batch.scheduled[part].draft
    return depth < len(draft) and draft[depth] == token_id and token_id not in request.stop_ids


def _appended(row: RowState, outcome: Outcome) -> Outcome:
    if isinstance(outcome, Sampled):
        try:
            row.append(outcome.token_id)
        except Exception as error:
            return failure_of(error, "taking in its token")
    return outcome
