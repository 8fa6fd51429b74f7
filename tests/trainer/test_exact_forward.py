"""An `exact_forward` model has the server's bits at any width, number of rows and number of threads, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from myserve import exact_forward, exact_logprobs
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.trainer import exact_forward as module
from runs import Asked, run

PROMPTS = [[5, 7, 100, 200, 33], [41, 90, 12], list(range(20, 61))]
THREADS = (1, 2, 3, 5, 6, 8)
ODD = ["odd_llama", "odd_gemma3", "odd_starcoder2"]
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def logprobs_of(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """The trainer's, of every completion token, from one padded batch."""
    sequences = [[*prompt, *ids] for prompt, ids in rows]
    width = max(map(len, sequences))
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([s + [0] * (width - len(s)) for s in sequences]),
            attention_mask=torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences]),
            use_cache=False,
        ).logits
    drawn = [logits[i, len(p) - 1 : len(p) - 1 + len(ids)] for i, (p, ids) in enumerate(rows)]
    return exact_logprobs(torch.cat(drawn), torch.tensor([i for _, ids in rows for i in ids])).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ODD)
def test_odd_widths_rows_and_threads_have_the_servers_logprobs(
    arch: str, dtype: str, make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path]
) -> None:
    params = SamplingParams(max_tokens=25, seed=7, ignore_eos=True)
    drawn = run(make_engine(arch, dtype=dtype), [Asked(prompt, params) for prompt in PROMPTS])
    rows = [(prompt, choice.ids) for prompt, [choice] in zip(PROMPTS, drawn, strict=True)]
    served = [token.logprob for [choice] in drawn for token in choice.tokens]
    model = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=getattr(torch, dtype)))
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert logprobs_of(model, rows) == served, f"{threads} threads"
    assert logprobs_of(model, rows[:1]) == served[:25]


@pytest.mark.parametrize("arch", ["odd_gemma3", "odd_starcoder2"])
def test_control_with_pytorchs_activations_it_has_not(
    arch: str,
    make_engine: Callable[..., Engine],
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(max_tokens=25, seed=7, ignore_eos=True)
    drawn = run(make_engine(arch, dtype="float32"), [Asked(prompt, params) for prompt in PROMPTS])
    rows = [(prompt, choice.ids) for prompt, [choice] in zip(PROMPTS, drawn, strict=True)]
    monkeypatch.setattr(module, "install_activations", lambda *_: 0)
    model = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model(arch)))
    assert logprobs_of(model, rows) != [token.logprob for [choice] in drawn for token in choice.tokens]


@pytest.mark.parametrize("arch", ODD)
def test_gradients_are_the_usual_ones(arch: str, tiny_model: Callable[[str], Path]) -> None:
    gradients = []
    for wrap in (lambda model: model, exact_forward):
        model: Any = wrap(AutoModelForCausalLM.from_pretrained(tiny_model(arch)))
        model(input_ids=torch.tensor(PROMPTS[2:]), use_cache=False).logits.log_softmax(-1)[
            ..., 7
        ].mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_model_on_another_device_is_refused(tiny_model: Callable[[str], Path]) -> None:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).to("meta")
    with pytest.raises(ValueError, match="CPU"):
        exact_forward(model)  # type: ignore[arg-type]
