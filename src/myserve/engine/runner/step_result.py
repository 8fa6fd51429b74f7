"""Holds what a step gave; divides a step into its requests' parts, and puts their results together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from myserve.core.sampling import Outcome, Sampled
from myserve.engine.outputs import PromptLogprob
from myserve.engine.scheduling.batch import Batch
from myserve.engine.scheduling.request import Request

__all__ = ["StepResult", "divided", "merged"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """For each of the batch's draws, samples or its row's error; and the prompts whose scores are done, or broke.

    A draw gives one outcome, or of a draft those that it has right and one more.
    """

    draws: list[list[Outcome]]
    routed_experts: list[list[bytes | None]]  # of each outcome's forward pass, where its request asked
    prompt_logprobs: dict[Request, tuple[PromptLogprob, ...]]
    failed_prompts: dict[Request, Exception]
    sampling_seconds: float
    # False where a step of its shape takes less: it was recorded, or no recording of its shape was there yet
    is_typical: bool = True

    @property
    def token_ids(self) -> list[list[int | None]]:
        """The drawn ids; None where a row failed."""
        return [
            [outcome.token_id if isinstance(outcome, Sampled) else None for outcome in draw]
            for draw in self.draws
        ]


def divided(batch: Batch) -> list[Batch]:
    """Return a batch of each scheduled part, with the draws that are made from it.

    Each makes all copies of blocks: made again, they are right once the part that filled the block has run.
    """
    parts = [Batch(copies=batch.copies) for _ in batch.scheduled]
    for alone, part in zip(parts, batch.scheduled, strict=True):
        alone.add(part)
    for request, index in batch.draws:
        parts[index].draws.append((request, 0))
    return parts


def merged(batch: Batch, results: Sequence[StepResult]) -> StepResult:
    """Return the results of `divided(batch)` as one, in the order of the batch's draws."""
    draws = [iter(zip(result.draws, result.routed_experts, strict=True)) for result in results]
    drawn = [next(draws[index]) for _, index in batch.draws]
    scored = {request: scores for result in results for request, scores in result.prompt_logprobs.items()}
    failed = {request: error for result in results for request, error in result.failed_prompts.items()}
    return StepResult(
        [draw for draw, _ in drawn],
        [routed for _, routed in drawn],
        scored,
        failed,
        sum(result.sampling_seconds for result in results),
    )
