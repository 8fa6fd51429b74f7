"""A head apart from its body gives the whole model's logits, wherever the body stands in the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.runner import model_runner
from myserve.engine.runner.logit_rows import LogitRows, body_outputs, keep_rows
from myserve.errors import UnsupportedModelError
from runs import Asked, run, run_one

PROMPT = list(range(10, 50))


@pytest.mark.parametrize(
    ("arch", "body"),
    [
        ("llama", "model"),
        ("gpt2", "transformer"),
        ("opt", "model.decoder"),
        ("gemma2", "model"),
        ("gemma3", "model"),
    ],
)
def test_the_body_is_found_and_its_rows_have_the_models_logits(
    hf_model: Callable[[str], Any], arch: str, body: str
) -> None:
    model = hf_model(arch)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode(), body_outputs(model) as outputs, keep_rows(model, body) as rows:
        wanted = model(input_ids=ids, use_cache=False).logits[0]
        assert next(reversed(outputs)) == body
        assert torch.allclose(rows[3:9], wanted[3:9], atol=1e-5)
        assert torch.allclose(rows.from_row(5)[0:2], wanted[5:7], atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("arch", ["opt", "gemma3"])
def test_a_prompt_is_scored_and_the_engine_lives(
    make_engine: Callable[..., Engine], hf_model: Callable[[str], Any], arch: str
) -> None:
    engine = make_engine(arch)
    scored = run_one(engine, PROMPT, max_tokens=2, temperature=0, prompt_logprobs=0)
    with torch.no_grad():
        logprobs = hf_model(arch)(torch.tensor([PROMPT]), use_cache=False).logits[0].log_softmax(-1)
    found = next(delta.prompt_logprobs for delta in scored.deltas if delta.prompt_logprobs is not None)
    wanted = [float(logprobs[i, token]) for i, token in enumerate(PROMPT[1:])]
    assert [entry.logprob for entry in found[1:]] == pytest.approx(wanted, abs=1e-4)
    assert run_one(engine, PROMPT, max_tokens=2, temperature=0).finish_reason == "length"


def test_a_prompt_whose_scoring_raises_fails_alone(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("llama")
    plain = Asked(PROMPT, SamplingParams(max_tokens=4, temperature=0))
    expected = run(engine, [plain])[0][0]

    def breaks(self: LogitRows, rows: slice) -> torch.Tensor:
        raise IndexError("no such row")

    monkeypatch.setattr(LogitRows, "__getitem__", breaks)
    asked = [Asked(PROMPT, SamplingParams(max_tokens=4, prompt_logprobs=1)), plain]
    (broken,), (whole,) = run(engine, asked)
    assert broken.finish_reason == "error" and "scoring its prompt" in str(broken.error)
    assert whole.numbers == expected.numbers and engine.is_alive


def test_a_model_without_a_body_is_refused(
    tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogitRows, "__getitem__", lambda self, rows: torch.zeros(rows.stop - rows.start, 384))
    assert model_runner.observe
    with pytest.raises(UnsupportedModelError, match="no body whose last hidden state"):
        Engine.from_pretrained(str(tiny_model("llama")))
