"""Adds drafts to a planned step: as many as pay by what rows cost and by how often such drafts are right. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from myserve.engine.drafting.allotment import allot
from myserve.engine.drafting.drafts import MOST_DRAFTED, Draft
from myserve.engine.scheduling.batch import Batch, Limits
from myserve.engine.scheduling.block_tables import BlockTables
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.row_costs import ROW_COUNTS, RowCosts, padded_draft_rows
from myserve.engine.scheduling.step_costs import MOST_WANTED, padded_rows, padded_wanted

__all__ = ["DraftCounts", "Drafter", "Speculation"]

MOST_ROWS = ROW_COUNTS[-1]
LIKELY = 0.5  # beside prompts a drafted token is run that is at least so likely


class Drafter(Protocol):
    """Proposes tokens, and is told when a request has ended: `drafting.drafts.Drafts`, or a test's."""

    def propose(self, asked: Sequence[tuple[Request, int]]) -> Sequence[Draft | None]: ...
    def end(self, request: Request) -> None: ...


@dataclass(slots=True)
class DraftCounts:
    """Count what was drafted and accepted, in all; numbers that only grow."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: Counter[str] = field(default_factory=Counter)  # "0": the first of a draft
    draft_tokens_by_drafter: Counter[str] = field(default_factory=Counter)
    accepted_by_drafter: Counter[str] = field(default_factory=Counter)


class Speculation:
    """Chooses drafts for the decodes of a step, and keeps count.

    `number`: how many tokens a draft has; None: as many as pay.
    """

    def __init__(
        self, drafter: Drafter, limits: Limits, row_costs: RowCosts, number: int | None = None
    ) -> None:
        self.drafter = drafter
        self.row_costs = row_costs
        self.counts = DraftCounts()
        self._limits = limits
        self._number = number

    def add_drafts(self, batch: Batch, tables: BlockTables) -> None:
        """Let the decodes of a step verify drafts. Nothing is preempted for them, and no prompt is kept waiting."""
        decodes = [
            i for i, part in enumerate(batch.scheduled) if part.is_decode and part.request.num_output_tokens
        ]
        room = self._room(batch)
        if not decodes or room <= 0:
            return
        asked = [(i, most) for i in decodes if (most := self._most(batch.scheduled[i].request, tables)) > 0]
        proposed = self.drafter.propose([(batch.scheduled[i].request, most) for i, most in asked])
        drafts = {i: draft for (i, _), draft in zip(asked, proposed, strict=True) if draft is not None}
        for i, count in zip(drafts, self._counts(list(drafts.values()), batch, room), strict=True):
            request, draft = batch.scheduled[i].request, drafts[i]
            count = min(count, room)
            if count and not tables.extend(request, 1 + count):
                count = min(count, tables.room_of(request) - 1)
            if count > 0:
                batch.add_draft(i, draft.token_ids[:count], draft.drafter)
                room -= count

    def _room(self, batch: Batch) -> int:
        """Return how many drafted tokens the step has room for.

        Beside prompts they are as many as cost no larger output layer, and no larger recording: a row more than one
        holds costs sixteen or 32.
        """
        room = self._limits.max_num_batched_tokens - batch.num_tokens
        if batch.num_prefill_tokens:
            wanted = len(batch.draws)
            room = min(room, padded_rows(batch.num_tokens) - batch.num_tokens)
            return min(room, padded_wanted(wanted) - wanted) if 0 < wanted <= MOST_WANTED else 0
        return room if self._number is not None else min(room, MOST_ROWS - batch.num_tokens)

    def observe(self, batch: Batch, seconds: float) -> None:
        """Take in a step's seconds, sampling left out."""
        if not batch.num_prefill_tokens and batch.num_tokens:
            has_drafts = any(part.draft or part.again for part in batch.scheduled)
            rows = padded_draft_rows(batch.num_tokens) if has_drafts else batch.num_tokens
            if rows <= MOST_ROWS:
                self.row_costs.observe(rows, seconds)

    def count(self, batch: Batch, drawn: Sequence[Sequence[int | None]]) -> None:
        """Take in how much of a step's drafts was drawn."""
        for (request, index), tokens in zip(batch.draws, drawn, strict=True):
            part = batch.scheduled[index]
            if part.draft and part.request is request:
                self._count(request, part.draft, part.drafter, tokens)

    def _count(
        self, request: Request, draft: Sequence[int], drafter: str, tokens: Sequence[int | None]
    ) -> None:
        accepted = 0
        for drafted, token_id in zip(draft, tokens, strict=False):
            if drafted != token_id:
                break
            self.counts.accepted_by_position[str(accepted)] += 1
            accepted += 1
        self.counts.drafts += 1
        self.counts.draft_tokens += len(draft)
        self.counts.accepted_tokens += accepted
        self.counts.draft_tokens_by_drafter[drafter] += len(draft)
        self.counts.accepted_by_drafter[drafter] += accepted
        request.num_draft_tokens += len(draft)
        request.num_accepted_tokens += accepted

    def _most(self, request: Request, tables: BlockTables) -> int:
        """Return how many tokens its draft may have: one more is drawn, whether the draft is right or not."""
        left = min(
            request.max_tokens - request.num_output_tokens, self._limits.max_model_len - request.num_tokens
        )
        most = min(left - 1, MOST_DRAFTED if self._number is None else self._number)
        return tables.most_drafted(request, most)

    def _counts(self, drafts: Sequence[Draft], batch: Batch, room: int) -> list[int]:
        if self._number is not None:
            return [len(draft.token_ids) for draft in drafts]
        if batch.num_prefill_tokens:
            return [sum(chance >= LIKELY for chance in draft.chances) for draft in drafts]
        rows = batch.num_tokens

        def cost(count: int) -> float:
            return self.row_costs.relative(count if count == rows else padded_draft_rows(count))

        return allot([draft.chances for draft in drafts], rows, rows + room, cost)
