"""The page's blocks run in order, on a real server."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from myserve.sdk import (
    AdaptiveConcurrencyController,
    Conversation,
    DeploymentSampler,
    FixedConcurrencyController,
    RetryPolicy,
    SampledCompletion,
    SampleDelta,
    StepSummary,
)
from myserve.sdk.options import SampleOptions
from myserve.sdk.types import SamplerStats

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"


def test_every_block_runs(server_url, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    here = {
        '"http://localhost:8000"': repr(server_url),
        '"Qwen/Qwen3-8B"': repr(str(tiny_model("qwen3"))),
        '"my-model"': repr("tiny"),
    }
    namespace: dict[str, object] = {}
    for block in blocks:
        for theirs, ours in here.items():
            block = block.replace(theirs, ours)
        exec(compile(block, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 4 * 2 + 1 + 9 + 1 + 1 + 1  # samples, sync, batch, summary, drift, columns
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 1 + 9 * 2


def parameters(call: Callable[..., object]) -> list[str]:
    # a conversation's first messages: the page shows them in their place
    inner = ("self", "options", "preamble")
    return [name for name in inspect.signature(call).parameters if name not in inner]


DOCUMENTED = {
    "sampler": parameters(DeploymentSampler),
    "calls": [name for name, _ in inspect.getmembers(DeploymentSampler) if not name.startswith("_")],
    "chats": parameters(DeploymentSampler.sample_with_tokens),
    "batches": parameters(DeploymentSampler.sample_batch),
    "options": list(SampleOptions.__annotations__),
    "fixed": parameters(FixedConcurrencyController),
    "adaptive": parameters(AdaptiveConcurrencyController),
    "summary": list(StepSummary.__annotations__),
    "completion": [field.name for field in fields(SampledCompletion)],
    "delta": [field.name for field in fields(SampleDelta)],
    "stats": [field.name for field in fields(SamplerStats)],
    "retry": [field.name for field in fields(RetryPolicy)],
    "conversation": parameters(Conversation),
    "errors": ["index", "attempts", "status", "server_message", "retryable"],
}


@pytest.mark.parametrize("what", DOCUMENTED)
def test_every_parameter_and_field_is_on_the_page(what):
    page = PAGE.read_text()
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`|```.*?```", page, re.DOTALL))))
    assert [name for name in DOCUMENTED[what] if name not in words] == []
