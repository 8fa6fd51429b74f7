"""From what the runner drew and the scheduler decided to what a caller is told: pure, and the same for every route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from myserve.core.sampling import Outcome, Sampled
from myserve.engine.outputs import FinishReason, KeptSet, RequestMetrics, TokenOutput
from myserve.engine.requests.admission import Submission
from myserve.engine.requests.stream import StepOutcome
from myserve.engine.scheduling.batch import ScheduledTokens
from myserve.engine.scheduling.request import Request

__all__ = ["drafters_of", "outcome_of", "outcomes_of", "request_metrics", "token_output"]


def drafters_of(part: ScheduledTokens, draws: Sequence[Outcome]) -> list[str | None]:
    """Return which drafter had each token before it was drawn; None: no one."""
    drafted = [*part.draft, *[None] * len(draws)]
    return [
        part.drafter if isinstance(draw, Sampled) and draw.token_id == token_id else None
        for draw, token_id in zip(draws, drafted, strict=False)
    ]


def outcomes_of(
    request: Request,
    draws: Sequence[Outcome],
    routed_experts: Sequence[bytes | None],
    drafters: Sequence[str | None],
    ended: str | None,
    owner: Submission,
    weight_version: int,
    now: float,
    *,
    closed_early: bool,
) -> list[StepOutcome]:
    """Return what the draws of one step mean to the choice that they were made for: the last may end it."""
    last = len(draws) - 1
    first = request.num_output_tokens - sum(isinstance(draw, Sampled) for draw in draws)
    return [
        outcome_of(
            request,
            draw,
            routed,
            ended if i == last else None,
            owner,
            weight_version,
            now,
            place=first + i,
            drafter=drafter,
            closed_early=closed_early,
        )
        for i, (draw, routed, drafter) in enumerate(zip(draws, routed_experts, drafters, strict=True))
    ]


def outcome_of(
    request: Request,
    draw: Outcome,
    routed_experts: bytes | None,
    ended: str | None,
    owner: Submission,
    weight_version: int,
    now: float,
    *,
    place: int,
    drafter: str | None,
    closed_early: bool,
) -> StepOutcome:
    """Return what one draw means to the choice that it was made for.

    `now` in unix seconds; `place`: tokens of the completion before it; `closed_early`: its grammar was brought to an
    end for `max_tokens`.
    """
    if not isinstance(draw, Sampled):
        return StepOutcome(request.index, finish_reason="error", error=draw)
    stopped = ended == "stop"
    reason: int | str | None = owner.ends.reason(draw.token_id) if stopped else None
    if stopped and reason is None and closed_early:
        reason = "max_tokens"
    return StepOutcome(
        request.index,
        token=token_output(
            draw,
            routed_experts,
            weight_version,
            now,
            adapter_version=None if request.adapter is None else request.adapter.version,
            recomputed=request.recomputed_at == place,
            drafter=drafter,
        ),
        finish_reason=cast("FinishReason | None", ended),
        stop_reason=reason,
        hides_token=stopped and not owner.params.include_stop_str_in_output,
    )


def token_output(
    draw: Sampled,
    routed_experts: bytes | None,
    weight_version: int,
    now: float,
    *,
    adapter_version: int | None = None,
    recomputed: bool = False,
    drafter: str | None = None,
) -> TokenOutput:
    kept = draw.kept
    return TokenOutput(
        draw.token_id,
        draw.logprob,
        draw.sampling_logprob,
        top_logprobs=draw.top_logprobs,
        token_id_logprobs=draw.token_id_logprobs,
        kept=None if kept is None else KeptSet(kept.token_ids, kept.mass, kept.entropy),
        routed_experts=routed_experts,
        weight_version=weight_version,
        adapter_version=adapter_version,
        recomputed=recomputed,
        time=now,
        rank=draw.rank,
        entropy=draw.entropy,
        waterfall=draw.waterfall,
        drafter=drafter,
    )


def request_metrics(
    request: Request, now: float, unix_now: float, num_concurrent_requests: int, kv_cache_usage: float
) -> RequestMetrics:
    """A request's durations at its end. What never happened took no time. `unix_now`: what a calendar calls `now`."""
    times = request.times
    admitted = now if times.admitted is None else times.admitted
    first = now if times.first_token is None else times.first_token
    last = first if times.last_token is None else times.last_token
    return RequestMetrics(
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=request.num_cached_tokens,
        arrival_time=unix_now - (now - times.arrived),
        prefill_queue_duration=admitted - times.arrived,
        prefill_duration=first - admitted,
        generation_duration=last - first,
        time_to_first_token=first - times.arrived,
        num_concurrent_requests=num_concurrent_requests,
        kv_cache_usage=kv_cache_usage,
        num_draft_tokens=request.num_draft_tokens,
        num_accepted_tokens=request.num_accepted_tokens,
    )
