"""Chooses between drafters: n-grams, what a grammar forces, and a draft model where it pays. `scheduling.Drafter`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from myserve.engine.drafting.drafts import GRAMMAR, MODEL, Draft, Drafts
from myserve.engine.runner.draft_model import MOST_BY_MODEL, DraftModel
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.scheduling.request import Request

__all__ = ["CombinedDrafts"]

PROBE_EVERY = 32  # proposals that did not pay: then one token is drafted, to learn whether it would now


class CombinedDrafts:
    """One draft of each request.

    What its grammar forces goes first, unless n-grams agree with it and go further; a draft model is asked where the
    n-grams have nothing as likely.
    """

    def __init__(
        self,
        drafts: Drafts,
        runner: ModelRunner,
        model: DraftModel | None,
        seconds: Callable[[int], float],
        number: int | None,
    ) -> None:
        """`seconds(n)`: of a step of n rows; 0 while nothing is known. `number`: tokens of a draft; None: as pays."""
        self._drafts, self._runner, self._model, self._seconds = drafts, runner, model, seconds
        self._number = number
        self._idle = 0  # proposals since the model was asked last

    def propose(self, asked: Sequence[tuple[Request, int]]) -> list[Draft | None]:
        """Return a draft of each request, or None."""
        found = self._drafts.propose(asked)
        for i, (request, most) in enumerate(asked):
            forced, draft = self._runner.forced_of(request)[:most], found[i]
            if forced and (draft is None or draft.token_ids[: len(forced)] != forced):
                found[i] = self._drafts.offer(request, forced, GRAMMAR)
        if self._model is not None:
            self._ask_model(self._model, asked, found)
        return found

    def end(self, request: Request) -> None:
        """Let go of a request."""
        self._drafts.end(request)
        if self._model is not None:
            self._model.end(request)

    def _ask_model(
        self, model: DraftModel, asked: Sequence[tuple[Request, int]], found: list[Draft | None]
    ) -> None:
        """Put the model's drafts in the place of none, and of less likely ones."""
        wanted: list[tuple[int, Request, int]] = []
        for i, ((request, most), draft) in enumerate(zip(asked, found, strict=True)):
            chance = self._drafts.chance_of_model(request)
            count = min(most, self._count(model, chance, len(asked)))
            if count and (draft is None or draft.chances[0] < chance):
                wanted.append((i, request, count))
        if not wanted:
            self._idle += 1
            return
        self._idle = 0
        drafted = model.draft(
            [(request, self._runner.row_of(request), count) for _, request, count in wanted]
        )
        for (i, request, _), token_ids in zip(wanted, drafted, strict=True):
            if token_ids:
                found[i] = self._drafts.offer(request, token_ids, MODEL)

    def _count(self, model: DraftModel, chance: float, requests: int) -> int:
        """Return how many tokens of the model pay: each is a pass of it, and a row of the target's."""
        if self._number is not None:
            return min(self._number, MOST_BY_MODEL)
        step, own = self._seconds(requests), model.pass_seconds
        if self._idle >= PROBE_EVERY or not step or not own:
            return 1
        best, speed = 0, 1.0 / step
        tokens, so_far = 1.0, 1.0
        for count in range(1, MOST_BY_MODEL + 1):
            so_far *= chance
            tokens += so_far
            faster = tokens / (self._seconds(requests * (1 + count)) + count * own)
            if faster > speed:
                best, speed = count, faster
        return best
