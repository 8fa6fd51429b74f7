"""Ratios, bounds, the ledger and a run taken up again: what the benchmark says must be what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ledger
from benchmarks.comparison import Comparison, table
from benchmarks.roofline import Machine, bound, least_ms_per_step, most_prefill_tokens_per_s
from myserve.bench.figures import Figures, RequestTimes, figures
from myserve.bench.workload import PRESETS, Workload

MACHINE = Machine("a cpu", cores=2, memory_gib=24, read_gb_s=28, bf16_gflop_s=450, f32_gflop_s=200)


def run_of(step: float) -> Figures:
    """A run of 8 streams that decode a token every `step` seconds."""
    return figures([RequestTimes(0.0, (1.0, 1.0 + step, 1.0 + 2 * step), 3, 128)] * 8, requests=8)


@pytest.fixture
def comparison() -> Comparison:
    result = Comparison("abc1234", "python -m benchmarks --only decode8", MACHINE)
    result.runs["decode8"] = {
        "ours": [run_of(step) for step in (0.06, 0.05, 9.0)],  # one round was disturbed
        "openvino": [run_of(step) for step in (0.08, 0.08, 0.08)],
        "vllm": [],
    }
    result.ready_s["ours"] = 4.25
    result.cold_ms["ours"] = {"32": (194.0, 87.0), "256": (938.0, 708.0)}
    result.cold_ms["openvino"] = {"32": (142.0, 141.0)}
    result.busy = 0.04
    result.failures.append("decode8: vllm is not running")
    return result


def test_ratios_are_of_medians_and_a_missing_peer_has_none(comparison: Comparison) -> None:
    (row,) = comparison.rows()
    assert row.values == pytest.approx({"ours": 60, "openvino": 80})
    assert row.ratio("openvino") == pytest.approx(0.75)
    assert row.ratio("vllm") is None
    assert row.share_of_bound() == pytest.approx(row.bound / 60)


def test_a_run_taken_up_again_is_the_run_that_was_saved(comparison: Comparison, tmp_path: Path) -> None:
    comparison.save(tmp_path / "runs" / "last.json")
    assert Comparison.load(tmp_path / "runs" / "last.json") == comparison


def test_the_ledger_keeps_figures_failures_and_what_was_there(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "LEDGER.md"
    path.write_text("# Ledger\n", "utf-8")
    names = ["ours", "openvino", "vllm"]
    for note in ("First try.", "Second: slower, dropped."):
        ledger.append(
            ledger.entry(note, commit="abc1234", when="2026-01-02", comparison=comparison, contenders=names),
            path,
        )
    text = path.read_text("utf-8")
    assert text.startswith("# Ledger\n")
    assert text.index("First try.") < text.index("Second: slower, dropped.")
    line = next(line for line in text.splitlines() if line.startswith("| decode8 |"))
    assert [cell.strip() for cell in line.split("|")][5:8] == ["–", "0.75", "–"]
    cold = "first prompt of 256 (later), ms: ours 938 (708), openvino –, vllm –"
    facts = [
        comparison.command,
        "a cpu, 2 cores",
        "ours 4.2",
        "Failed: decode8: vllm is not running",
        cold,
        "4% at most",
    ]
    for fact in facts:
        assert text.count(fact) == 2


def test_the_table_has_a_row_for_each_workload_each_cold_length_and_two_for_the_process(
    comparison: Comparison,
) -> None:
    assert table(comparison, ["ours", "openvino", "vllm"]).row_count == 1 + 2 + 2


def test_one_stream_waits_for_memory_and_many_for_arithmetic() -> None:
    """Twice the bandwidth halves a lone stream's step; at 32 streams twice the arithmetic does."""

    def quicker(rows: int, read: float = 1, flops: float = 1) -> float:
        better = Machine("b", 2, 24, MACHINE.read_gb_s * read, MACHINE.bf16_gflop_s * flops, 200)
        return least_ms_per_step(MACHINE, rows, 160) / least_ms_per_step(better, rows, 160)

    assert quicker(1, read=2) == pytest.approx(2)
    assert quicker(1, flops=2) == pytest.approx(1)
    assert quicker(32, flops=1.1) == pytest.approx(1.1)
    assert quicker(32, read=2) == pytest.approx(1)


def test_bounds_fit_together() -> None:
    prefill = Workload.parse(PRESETS["prefill512"])
    assert bound(MACHINE, prefill, "prefill_tokens_per_s") == pytest.approx(
        most_prefill_tokens_per_s(MACHINE)
    )
    decode = Workload.parse(PRESETS["decode8"])
    step_s = bound(MACHINE, decode, "ms_per_step") / 1e3
    whole = bound(MACHINE, decode, "tokens_per_s")
    assert whole < 8 / step_s, "the whole run has a prefill too"
    seconds = 8 * decode.output_len / whole
    assert seconds == pytest.approx(8 * 128 / most_prefill_tokens_per_s(MACHINE) + 63 * step_s)
