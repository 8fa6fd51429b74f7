"""The API as a type checker sees it: what is right passes, what is wrong is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from myserve.sdk.types import Alternative, SampledCompletion

ROOT = Path(__file__).parents[2]
HEAD = """
from typing import assert_type
from myserve.sdk import (
    AdaptiveConcurrencyController, BatchGroup, Completions, DeploymentSampler, SampledCompletion, SampleDelta,
    StepSummary,
)
sampler = DeploymentSampler("http://x", "m", concurrency_controller=AdaptiveConcurrencyController())
"""
RIGHT = """
async def right() -> None:
    completions = await sampler.sample_with_tokens([{"role": "user", "content": "x"}], n=2, logprobs=True)
    assert_type(completions, Completions)
    assert_type(completions[0], SampledCompletion)
    assert_type(completions[0].inference_logprobs, list[float] | None)
    assert_type(await sampler.sample_with_prompt_tokens([1], max_tokens=4, on_error="keep"), Completions)
    async for delta in sampler.stream_tokens("x", n=2):
        assert_type(delta, SampleDelta)
    assert_type(await sampler.sample_batch(["x"], n=2), list[Completions])
    async for group in sampler.sample_batch(["x"]):
        assert_type(group, BatchGroup)
    assert_type(sampler.sync.sample_with_prompt_tokens([1]), Completions)
    assert_type(AdaptiveConcurrencyController().step_completed(), StepSummary)
"""
WRONG = """
async def wrong() -> None:
    await sampler.sample_with_prompt_tokens([1], max_tokens="4")
    await sampler.sample_with_prompt_tokens([1], on_error="ignore")
    await sampler.sample_with_prompt_tokens([1], max_token=4)
    (await sampler.sample_with_prompt_tokens([1]))[0].tokens
    DeploymentSampler("http://x", "m", concurrency_controller=16)
"""


def check(tmp_path: Path, program: str) -> list[str]:
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(tmp_path / "program.py")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if "program.py" in line and "error" in line]


def test_what_is_right_passes_and_each_wrong_line_is_found(tmp_path):
    errors = check(tmp_path, HEAD + RIGHT + WRONG)
    first_wrong = (HEAD + RIGHT).count("\n") + 3
    assert [int(error.split(":")[1]) for error in errors] == list(range(first_wrong, first_wrong + 5)), errors


@pytest.mark.parametrize("name", ["text", "full_tokens", "prompt_len", "finish_reason", "completion_len"])
def test_the_seeds_required_fields_are_required(name):
    fields = {"text": "", "full_tokens": [1], "prompt_len": 1, "finish_reason": "stop", "completion_len": 0}
    del fields[name]
    with pytest.raises(TypeError, match=name):
        SampledCompletion(**fields)


def test_a_completion_survives_json():
    sample = SampledCompletion(
        text="4",
        full_tokens=[1, 4],
        prompt_len=1,
        finish_reason="stop",
        completion_len=1,
        inference_logprobs=[-0.1],
        top_logprobs=[
            (Alternative(token_id=4, logprob=-0.1, token="4"), Alternative(logprob=-2.5, token="5"))
        ],
        weight_version_spans=[{"start": 0, "end": 1, "weight_version": 3}],
        seed=2**63 - 1,
    )
    assert SampledCompletion.from_json(sample.to_json()) == sample
    assert SampledCompletion.from_json(sample.to_json() | {"from_the_future": 1}) == sample
    assert "routing_matrices" not in sample.to_json()
