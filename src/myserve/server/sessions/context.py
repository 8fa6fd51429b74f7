"""Answers that another context is given are the ids that they were sampled as there, too, and no text of theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from myserve.server.prompts.required_prefix import turns_of
from myserve.server.sessions.kept import KeptTurn

__all__ = ["with_sampled_answers"]


def with_sampled_answers(
    rendered: Sequence[int], answers: Sequence[KeptTurn | None], eos_ids: Collection[int]
) -> list[int]:
    """Return rendered turns in which each answer that is kept has its sampled ids.

    `answers` are those of the rendered messages, in order; None: it was not sampled here. An answer's turn is known by
    what opens one: nothing is put in place where there are more or fewer turns that begin like this than answers.
    """
    first = next((answer for answer in answers if answer is not None), None)
    opening = [] if first is None else _opening(first, eos_ids)
    turns = [list(turn) for turn in turns_of(rendered, eos_ids)]
    found = [at for at, turn in enumerate(turns) if turn[: len(opening)] == opening and turn[-1] in eos_ids]
    if first is None or not opening or len(found) != len(answers):
        return list(rendered)
    for at, answer in zip(found, answers, strict=True):
        if answer is not None and _opening(answer, eos_ids) == opening and not _runs_on(answer, eos_ids):
            turns[at] = [*opening, *answer.sampled, *([] if answer.has_ended else turns[at][-1:])]
    return [token_id for turn in turns for token_id in turn]


def _opening(turn: KeptTurn, eos_ids: Collection[int]) -> list[int]:
    """Return what a prompt has behind its last EOS: it opens the answer."""
    new = list(turn.new)
    last = max((at for at, token_id in enumerate(new) if token_id in eos_ids), default=-1)
    return new[last + 1 :]


def _runs_on(turn: KeptTurn, eos_ids: Collection[int]) -> bool:
    """Return whether an answer went on behind an EOS: in another prompt that would be a turn's end."""
    return any(token_id in eos_ids for token_id in turn.sampled[:-1])
