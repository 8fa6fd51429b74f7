"""Every metric survives the body and the headers, and nothing else gets in."""

from __future__ import annotations

import pytest

from myserve.wire.perf_metrics import PerfMetrics

FULL = PerfMetrics(
    prompt_tokens=9,
    cached_prompt_tokens=0,
    server_time_to_first_token=0.125,
    server_processing_time=1.5,
    num_concurrent_requests=3,
    prefill_queue_duration=0.0,
    prefill_duration=0.01,
    generation_queue_duration=0.0,
    generation_duration=1.25,
    tokenizer_queue_duration=0.0,
    tokenizer_duration=1e-05,
    kv_cache_usage=0.875,
    speculation_generated_tokens=20,
    speculation_accepted_tokens=11,
    backend_host="host-1",
    deployment="accounts/a/deployments/d",
)


def test_both_forms_carry_all() -> None:
    assert len(FULL.to_dict()) == len(FULL.to_headers()) == 16
    assert PerfMetrics.from_mapping(FULL.to_dict()) == FULL
    assert PerfMetrics.from_mapping(FULL.to_headers()) == FULL


def test_zero_is_a_value_and_none_is_absent() -> None:
    assert PerfMetrics(cached_prompt_tokens=0).to_dict() == {"cached-prompt-tokens": 0}
    assert PerfMetrics().to_dict() == {}


@pytest.mark.parametrize("value", ["soon", None, "nan-ish", "inf"])
def test_a_broken_count_is_not_measured(value: object) -> None:
    assert PerfMetrics.from_mapping({"fireworks-prompt-tokens": value, "x": 1}) == PerfMetrics()
