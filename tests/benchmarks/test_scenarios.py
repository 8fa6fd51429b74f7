"""Loads of their own moments: what is sent is the same for every contender, and figures are of what they name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.comparison import Comparison, spread
from benchmarks.ledger import entry
from benchmarks.roofline import RANDOM, Machine, ModelSize, least_ms_per_step
from benchmarks.scenarios import (
    FIRST_TOKEN_S,
    JOINS_AT_S,
    SHORT,
    beside_streams_figures,
    burst,
    capacity,
    poisson,
    poisson_figures,
    prompt_beside_streams,
)
from myserve.bench.figures import RequestTimes


def steady(started: float, first: float, gap: float, tokens: int, prompt: int = 64) -> RequestTimes:
    return RequestTimes(started, tuple(first + gap * i for i in range(tokens)), tokens, prompt)


def test_a_prompt_joins_eight_streams() -> None:
    *streams, prompt = prompt_beside_streams()
    assert {(one.at, one.prompt_len) for one in streams} == {(0.0, 64)} and len(streams) == 8
    assert (prompt.at, prompt.prompt_len) == (JOINS_AT_S, 2048)


def test_gaps_beside_a_prompt_are_those_while_it_waited() -> None:
    """Two streams of 0.1 s; the prompt waits from 4.0 to 5.0, in which one gap of 0.6 s ends."""
    stalled = RequestTimes(0.0, (3.8, 3.9, 4.0, 4.1, 4.7, 4.8, 4.9, 5.5), 8, 64)
    figures = beside_streams_figures([stalled, stalled, RequestTimes(4.0, (5.0, 5.1), 2, 2048)])
    assert figures["TTFT"] == pytest.approx(1000)
    assert figures["before p50"] == pytest.approx(100)
    assert figures["beside max"] == pytest.approx(600), (
        "the gap that ends behind the first token does not count"
    )
    assert figures["beside p50"] == pytest.approx(100)


def test_streams_that_stood_still_until_the_prompt_was_done_have_no_gap_to_show() -> None:
    stopped = RequestTimes(0.0, (3.0, 3.1, 9.0), 3, 64)
    figures = beside_streams_figures([stopped, RequestTimes(4.0, (5.0,), 1, 2048)])
    assert math.isinf(figures["beside max"])


def test_poisson_arrivals_come_at_their_rate_and_are_the_same_for_everyone() -> None:
    planned = poisson(3, rate=2.0, requests=2000)
    assert planned == poisson(3, rate=2.0, requests=2000) != poisson(4, rate=2.0, requests=2000)
    assert planned[-1].at == pytest.approx(1000, rel=0.1)
    assert all(32 <= one.prompt_len <= 1024 and 16 <= one.output_len <= 128 for one in planned)
    assert {one.at for one in burst(3)} == {0.0}
    assert 0.5 < sum(one.prompt_len < SHORT for one in planned) / 2000 < 0.7, "short ones are the most"


def test_capacity_is_what_a_burst_is_answered_at() -> None:
    assert capacity([steady(0.0, 1.0, 0.5, 3), steady(0.0, 3.0, 0.5, 3)]) == pytest.approx(0.5)


def test_goodput_counts_requests_whose_reader_does_not_wait() -> None:
    quick = steady(0.0, 0.5, 0.1, 20)
    late = steady(0.0, FIRST_TOKEN_S + 0.1, 0.1, 20)
    slow = steady(0.0, 0.5, 0.3, 20, prompt=900)
    figures = poisson_figures([quick, late, slow])
    wall = 0.5 + 19 * 0.3
    assert figures["goodput, req/s"] == pytest.approx(1 / wall)
    assert figures["short TTFT p50"] == pytest.approx(1e3 * (0.5 + FIRST_TOKEN_S + 0.1) / 2)
    assert figures["between p50"] == pytest.approx(100)


def test_scenarios_stand_in_the_ledger_with_their_spread() -> None:
    machine = Machine("a cpu", cores=2, memory_gib=24, read_gb_s=28, bf16_gflop_s=450, f32_gflop_s=200)
    result = Comparison("abc1234", "python -m benchmarks --only beside-streams", machine, rate=0.7)
    result.scenarios["beside-streams"] = {"ours": [{"TTFT": 7000.0}, {"TTFT": 7100.0}], "vllm": []}
    result.sampling_share["decode32"] = {"ours": 0.071}
    text = entry("why", commit="abc1234", when="2026-01-02", comparison=result, contenders=["ours", "vllm"])
    assert "| beside-streams: TTFT | ms | 7050 (7000 to 7100) | – |" in text
    assert "| decode32: the sampler's share of its steps |  | 7.1% | – |" in text
    assert "Poisson arrivals: 0.700 requests a second." in text
    assert spread([1.0, 2.0]) == "1.5 (1 to 2)"


def test_a_models_size_is_read_off_its_config() -> None:
    assert RANDOM.body_weights == 440_401_920
    config = {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "hidden_size": 640,
        "head_dim": 256,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "vocab_size": 262_144,
    }
    size = ModelSize.of(config)
    assert size.head_weights == 640 * 262_144 and size.kv_bytes_per_token == 18 * 2 * 256 * 2
    # MiniMax's names no other widths for its lightning attention
    lightning = ModelSize.of(config | {"layer_types": ["linear_attention", "full_attention"] * 9})
    assert lightning.state_bytes == 9 * 4 * 256 * 256 * 4


def test_a_hybrids_size_is_read_off_its_files(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("qwen3_5_text")
    model = AutoModelForCausalLM.from_pretrained(folder)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]
    size, config = ModelSize.of_folder(folder), model.config
    assert size.body_weights == sum(m.weight.numel() for m in linears)
    attending = config.layer_types.count("full_attention")
    assert size.kv_bytes_per_token == attending * 2 * config.num_key_value_heads * config.head_dim * 2
    head = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    assert size.state_bytes == (config.num_hidden_layers - attending) * head * 4
    machine = Machine("x", 2, 24, read_gb_s=20.0, bf16_gflop_s=1e6, f32_gflop_s=200.0)
    more = least_ms_per_step(machine, 3, 0, size) - least_ms_per_step(machine, 2, 0, size)
    assert more == pytest.approx(2e3 * size.state_bytes / 20e9)
