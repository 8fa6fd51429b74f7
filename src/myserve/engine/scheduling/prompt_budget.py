"""The prompt tokens that one step has room for: by their number, and by the seconds that they take. Pure."""

from __future__ import annotations

from myserve.engine.scheduling.step_costs import MIN_PROMPT_TOKENS, StepCosts, nearest_padded_rows

__all__ = ["PromptBudget"]


class PromptBudget:
    """Hold what is left of a step for prompts, which take from it one after the other.

    >>> costs = StepCosts()
    >>> costs.observe(0, prompt_work=256.0, seconds=0.74); costs.observe(8, prompt_work=0.0, seconds=0.045)
    >>> budget = PromptBudget(costs, decodes=8, tokens=256)
    >>> budget.take(pending=20, context=0), budget.take(pending=2048, context=0), budget.take(pending=50, context=0)
    (20, 52, 0)
    """

    def __init__(self, costs: StepCosts, decodes: int, tokens: int) -> None:
        """`decodes`: requests that the step runs by one token; `tokens`: the most that prompts may have beside them."""
        self._costs = costs
        self._rows, self._tokens = decodes, tokens
        self._seconds = costs.seconds_for_prompts(decodes, tokens)
        self._is_fresh = True

    @property
    def is_spent(self) -> bool:
        return self._tokens <= 0

    def offer(self, pending: int, context: int) -> int:
        """Return how many of a prompt's `pending` tokens, behind `context` computed ones, may run; 0 for none.

        A prompt that is cut ends where the rows fill a recording, so that none is computed for nothing. The first one
        runs some tokens however slow they are.
        """
        most = min(pending, self._tokens)
        count = self._costs.tokens_in(self._seconds, context, most)
        if self._is_fresh:
            count = max(count, min(most, MIN_PROMPT_TOKENS))
        if 0 < count < pending:
            count = min(most, max(0, nearest_padded_rows(self._rows + count) - self._rows))
        return count

    def spend(self, count: int, context: int) -> None:
        """Take out what a prompt runs."""
        self._tokens -= count
        self._rows += count
        self._seconds -= self._costs.seconds_of_prompt(count, context)
        self._is_fresh = False

    def take(self, pending: int, context: int) -> int:
        """Return `offer`, and spend it."""
        count = self.offer(pending, context)
        self.spend(count, context)
        return count
