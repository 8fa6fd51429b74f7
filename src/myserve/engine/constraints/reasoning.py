"""A completion that thinks before it answers: the grammar begins behind the thinking, and the thinking ends in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from myserve.core.grammar import Reasoning
from myserve.engine.constraints.grammar import MARGIN, GrammarConstraint, allow, forbid, set_only
from myserve.engine.token_bytes import TokenBytes

__all__ = ["Marks", "Phase", "ReasoningConstraint"]


class Phase(Enum):
    OPENING = "opening"  # the first tokens: it may begin to think, or answer at once
    THINKING = "thinking"
    GAP = "gap"  # between the thinking and the answer: models put empty lines there
    ANSWER = "answer"


MAX_GAP = 2  # tokens of line breaks


@dataclass(frozen=True, slots=True)
class Marks:
    """Hold the token ids that begin and end one model's thinking."""

    start_ids: Sequence[int]
    end_ids: Sequence[int]
    end: bytes
    break_ids: frozenset[int]  # tokens of line breaks alone
    straddling: dict[int, list[int]]  # k -> tokens that begin with end[k:] and go on behind it

    @classmethod
    def of(cls, reasoning: Reasoning, table: TokenBytes, encode: Callable[[str], list[int]]) -> Marks:
        end = reasoning.end.encode()
        straddling: dict[int, list[int]] = {}
        breaks = set()
        for token_id, data in enumerate(table):
            if data and not data.strip(b"\n"):
                breaks.add(token_id)
            for k in range(len(end)) if end[-1:] in data[:-1] else ():
                if data.startswith(end[k:]) and len(data) > len(end) - k:
                    straddling.setdefault(k, []).append(token_id)
        return cls(encode(reasoning.start), encode(reasoning.end), end, frozenset(breaks), straddling)


class ReasoningConstraint:
    """`core.rows.Constraint` around a grammar's, or around none: then only the budget constrains.

    The budget counts the tokens behind the opening mark. When it is spent, or when `max_tokens` leaves no more than the
    grammar's shortest text needs, the closing mark is forced.
    """

    def __init__(
        self,
        reasoning: Reasoning,
        inner: GrammarConstraint | None,
        table: TokenBytes,
        marks: Marks,
        eos_ids: Sequence[int],
    ) -> None:
        self._reasoning = reasoning
        self._inner = inner
        self._table = table
        self._marks = marks
        self._eos_ids = eos_ids
        self._phase = Phase.THINKING if reasoning.starts_inside else Phase.OPENING
        self._mask = torch.zeros((len(table) + 31) // 32, dtype=torch.int32)
        self._seen = b""  # the end of what was thought, long enough to hold the closing mark
        self._count = 0  # tokens of this phase
        self._forced: list[int] = []  # of a mark that is being written

    def fork(self) -> ReasoningConstraint:
        """A copy that goes its own way."""
        inner = self._inner and self._inner.fork()
        twin = ReasoningConstraint(self._reasoning, inner, self._table, self._marks, self._eos_ids)
        twin._phase, twin._seen, twin._count = self._phase, self._seen, self._count
        twin._forced = list(self._forced)
        return twin

    @property
    def error(self) -> str | None:
        return self._inner.error if self._inner is not None else None

    @property
    def closes_early(self) -> bool:
        return self._inner is not None and self._inner.closes_early

    @property
    def ends(self) -> bool:
        return self._phase is Phase.ANSWER and self._inner is not None and self._inner.ends

    def prepare(self) -> None:
        if self._inner is not None and self._phase is not Phase.THINKING:
            self._inner.prepare()
        self._settle()

    def replay(self, token_id: int) -> None:
        """Take a token that was drawn earlier: as `append`, for which no mask is computed."""
        if self._inner is not None and self._phase is not Phase.THINKING:
            self._inner.settle()
        self._settle()
        self.append(token_id)

    def mask(self) -> Tensor | None:
        self.prepare()
        if self._forced:
            set_only(self._mask, self._forced[:1])
            return self._mask
        if self._inner is None:
            return None
        if self._phase is Phase.THINKING:
            return self._thinking_mask()
        if self._phase is Phase.ANSWER or self._inner.error is not None:
            return self._inner.mask()
        self._mask.copy_(self._inner.mask())
        allow(
            self._mask, self._marks.start_ids[:1] if self._phase is Phase.OPENING else self._marks.break_ids
        )
        return self._mask

    def append(self, token_id: int) -> None:
        if self._forced:
            self._forced.pop(0)
        match self._phase:
            case Phase.OPENING:
                self._open(token_id)
            case Phase.THINKING:
                self._think(token_id)
            case Phase.GAP if self._is_gap(token_id):
                self._skip()
                self._count += 1
                if self._count == MAX_GAP:
                    self._enter(Phase.ANSWER)
            case _:
                self._phase = Phase.ANSWER
                if self._inner is not None:
                    self._inner.append(token_id)

    def forced_token_ids(self) -> list[int]:
        """Return what is left of a mark that is being written, or what the grammar forces."""
        if self._forced or self._phase is not Phase.ANSWER or self._inner is None:
            return list(self._forced)
        return self._inner.forced_token_ids()

    def _settle(self) -> None:
        """Decide whether the end of the thoughts is forced."""
        if self._phase is Phase.THINKING and not self._forced and self._is_spent():
            self._forced = list(self._marks.end_ids)

    def _open(self, token_id: int) -> None:
        start = self._marks.start_ids
        expected = start[self._count] if self._count < len(start) else None
        if token_id != expected or (self._count == 0 and self._answers_with(token_id)):
            self._phase = Phase.ANSWER
            if self._inner is not None:
                self._inner.append(token_id)
            return
        self._skip()
        self._count += 1
        if self._count == len(start):
            self._enter(Phase.THINKING)
        elif self._inner is not None:
            self._forced = [start[self._count]]

    def _think(self, token_id: int) -> None:
        self._skip()
        self._count += 1
        end = self._marks.end
        self._seen += self._table[token_id]
        if end in self._seen:
            self._enter(Phase.GAP)
        self._seen = self._seen[-len(end) :]

    def _skip(self) -> None:
        if self._inner is not None:
            self._inner.elapse()

    def _enter(self, phase: Phase) -> None:
        self._phase, self._count, self._forced = phase, 0, []

    def _answers_with(self, token_id: int) -> bool:
        return self._inner is not None and self._inner.allows(token_id)

    def _is_gap(self, token_id: int) -> bool:
        return token_id in self._marks.break_ids and not self._answers_with(token_id)

    def _is_spent(self) -> bool:
        budget = self._reasoning.budget
        if budget is not None and self._count >= budget:
            return True
        spare = self._inner.spare if self._inner is not None else None
        return spare is not None and 0 <= spare - len(self._marks.end_ids) <= MARGIN

    def _thinking_mask(self) -> Tensor:
        """Anything, but an end without an answer, and tokens in which the answer would begin behind the mark."""
        self._mask.fill_(-1)
        forbid(self._mask, self._eos_ids)
        for k, token_ids in self._marks.straddling.items():
            if self._seen.endswith(self._marks.end[:k]):
                forbid(self._mask, token_ids)
        return self._mask
