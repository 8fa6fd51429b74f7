"""The report's figures against a plain computation; and exact_forward has the engine's bits, where others have not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from myserve.cli import app as command
from myserve.engine.config import EngineConfig
from myserve.errors import RequestError
from myserve.trainer.parity import ParityRow, measure_parity

TEXT = "The quick brown fox jumps over the lazy dog. Hello, hello world! One, two, three, four."


def test_the_figures_are_those_of_a_plain_computation() -> None:
    torch.manual_seed(0)
    engine = torch.randn(100, 50)
    trainer = engine + 0.01 * torch.randn(100, 50)
    targets = torch.randint(50, (99,)).tolist()
    row = ParityRow("float32")
    for start in range(0, 100, 30):  # in parts, as long texts are
        row.add(engine[start : start + 30], trainer[start : start + 30], targets[start : start + 30])
    ours, theirs = engine.double().log_softmax(-1), trainer.double().log_softmax(-1)
    gaps = (ours - theirs).abs()
    assert row.max_difference == gaps.max().item() and not row.equal_bits
    assert row.max_text_difference == gaps[range(99), targets].max().item()
    assert row.quantile(0.9) == pytest.approx(gaps.quantile(0.9).item(), rel=0.02)
    kl = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1)
    assert row.kl_mean == pytest.approx(kl.mean().item()) and row.kl_max == pytest.approx(kl.max().item())
    assert row.top1_flips == (engine.argmax(-1) != trainer.argmax(-1)).sum()


@pytest.mark.parametrize("arch", ["qwen3", "gemma2"])
def test_exact_forward_has_the_engines_bits(arch: str, tiny_model: Callable[[str], Path]) -> None:
    """The others are the control: they compute the same in another order, or in another type."""
    rows = {
        row.forward: row for row in measure_parity(str(tiny_model(arch)), [TEXT, "Hello"], most_tokens=24)
    }
    exact = rows["exact_forward"]
    assert exact.equal_bits and exact.max_difference == exact.kl_max == exact.quantile(0.9999) == 0.0
    assert 0 < rows["float32"].max_difference < 1e-3
    assert rows["bfloat16"].max_difference > 10 * rows["float32"].max_difference
    assert exact.positions == rows["float32"].positions > 24


def test_prompts_that_are_prefilled_in_chunks(tiny_model: Callable[[str], Path]) -> None:
    config = EngineConfig(prefill_chunk=16, num_blocks=64)
    (row,) = measure_parity(tiny_model("qwen3"), [TEXT * 2], forwards=["exact_forward"], config=config)
    assert row.equal_bits and row.positions > 48


def test_a_text_of_one_token_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="no two tokens"):
        measure_parity(str(tiny_model("qwen3")), ["a"])


def test_the_command(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    text, figures, chart = tmp_path / "text.txt", tmp_path / "parity.json", tmp_path / "parity.svg"
    text.write_text(TEXT)
    asked = ["parity", tiny_model("qwen3"), text, "--forward", "float32", "--forward", "exact_forward"]
    result = CliRunner().invoke(command, [*map(str, asked), "--json", str(figures), "--chart", str(chart)])
    assert result.exit_code == 0, result.output
    plain, exact = json.loads(figures.read_text())["rows"]
    assert (plain["equal_bits"], exact["equal_bits"]) == (False, True)
    assert plain["quantiles"]["0.999"] <= plain["max_difference"]
    assert "exact_forward: 0" in chart.read_text() and ElementTree.parse(chart).getroot().tag.endswith("svg")
    assert CliRunner().invoke(command, [*map(str, asked[:3]), "--forward", "float8"]).exit_code == 1
