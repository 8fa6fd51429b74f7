"""What a step and an end add to the counters: each prompt once, failed rows not, equal gaps together."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from myserve.engine.meters import EngineMeters, Histogram
from myserve.engine.scheduling.batch import Batch, ScheduledTokens
from myserve.engine.scheduling.request import Request


@dataclass
class Drawn:
    token_ids: list[list[int | None]]  # of a draft several
    sampling_seconds: float = 0.25


def request(prompt: int = 10, cached: int = 0, last_token: float | None = None) -> Request:
    made = Request("r", list(range(prompt)), max_tokens=5)
    made.num_cached_tokens = cached
    made.times.arrived, made.times.admitted, made.times.last_token = 1.0, 2.0, last_token
    return made


def step(
    meters: EngineMeters, requests: list[Request], token_ids: list[list[int | None]], now: float = 5.0
) -> None:
    batch = Batch(draws=[(r, 0) for r in requests])
    batch.add(ScheduledTokens(requests[0], 0, 7))
    meters.add_step(batch, Drawn(token_ids), seconds=0.5, now=now)


def test_a_first_token_tells_how_long_it_took() -> None:
    meters = EngineMeters()
    step(meters, [request(cached=4)], [[3]])
    assert (meters.prompt_tokens, meters.cached_prompt_tokens, meters.generation_tokens) == (10, 4, 1)
    waits = meters.time_to_first_token.sum, meters.queue_time.sum, meters.prefill_time.sum
    assert waits == (4.0, 1.0, 3.0)
    assert (meters.step_seconds, meters.sampling_seconds, meters.step_tokens.sum) == (0.5, 0.25, 7)
    assert meters.inter_token_latency.cumulative()[-1] == 0


def test_a_prompt_that_choices_share_is_counted_once() -> None:
    meters = EngineMeters()
    step(meters, [request(), request(cached=10), request(cached=10)], [[1], [2], [3]])
    assert (meters.prompt_tokens, meters.cached_prompt_tokens) == (10, 0)
    assert meters.time_to_first_token.cumulative()[-1] == 3


def test_later_tokens_tell_the_gap_and_failed_rows_nothing() -> None:
    meters = EngineMeters()
    step(
        meters,
        [request(last_token=4.5), request(last_token=4.5), request(last_token=3.0)],
        [[1], [2], [None]],
    )
    assert meters.generation_tokens == 2
    assert meters.inter_token_latency.cumulative()[-1] == 2
    assert meters.inter_token_latency.sum == pytest.approx(1.0)


def test_a_drafts_tokens_come_at_one_moment() -> None:
    meters = EngineMeters()
    step(meters, [request(last_token=4.5)], [[1, 2, 3]])
    assert meters.generation_tokens == 3
    assert meters.inter_token_latency.cumulative()[-1] == 3
    assert meters.inter_token_latency.sum == pytest.approx(0.5)


def test_an_end_is_counted_by_its_reason() -> None:
    meters, ended = EngineMeters(), request()
    ended.append(7)
    meters.add_end(ended, "length", now=9.0)
    assert meters.finished["length"] == 1 and meters.finished["error"] == 0
    assert meters.latency.sum == 8.0
    assert (meters.request_prompt_tokens.sum, meters.request_generation_tokens.sum) == (10, 1)


def test_a_histogram_counts_its_bounds_and_what_is_over_them() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 2.5):
        histogram.observe(value, times=2)
    assert histogram.cumulative() == [2, 6, 8] and histogram.sum == 14.0
