"""A trainer's logprobs are the engine's numbers to the bit, at any temperature and truncation, and have gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from myserve import exact_forward, exact_logprobs
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from runs import Asked, run

PROMPTS = [[5, 7, 100, 200, 33], [41, 90, 12]]
MIXES = [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.9}, {"top_k": 20, "min_p": 0.01}]


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_they_are_the_servers_to_the_bit(
    arch: str,
    mix: dict[str, Any],
    make_engine: Callable[..., Engine],
    tiny_model: Callable[[str], Path],
) -> None:
    params = SamplingParams(max_tokens=24, seed=7, kept=True, **mix)
    drawn = run(make_engine(arch), [Asked(prompt, params, 2) for prompt in PROMPTS])
    rows = [(PROMPTS[i], c.tokens) for i, group in enumerate(drawn) for c in group]
    sequences = [[*prompt, *(t.token_id for t in tokens)] for prompt, tokens in rows]
    width = max(map(len, sequences))
    batch = {
        "input_ids": torch.tensor([s + [0] * (width - len(s)) for s in sequences]),
        "attention_mask": torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences]),
    }
    model = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model(arch)))
    logits = model(**batch, use_cache=False).logits
    flat = torch.cat([logits[i, len(p) - 1 : len(p) - 1 + len(t)] for i, (p, t) in enumerate(rows)])
    tokens = [token for _, row in rows for token in row]
    ids = torch.tensor([token.token_id for token in tokens])
    kept = [token.kept.token_ids for token in tokens if token.kept is not None]
    assert exact_logprobs(flat, ids).tolist() == [token.logprob for token in tokens]
    behaviour = exact_logprobs(flat, ids, temperature=params.temperature, kept=kept)
    assert behaviour.tolist() == [token.sampling_logprob for token in tokens]
    # Control: the usual function, on the same logits, has other last bits.
    usual = flat.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert usual.tolist() != [token.logprob for token in tokens]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("truncated", [False, True])
def test_gradients_are_those_of_log_softmax(temperature: float, truncated: bool) -> None:
    torch.manual_seed(7)
    logits, ids = torch.randn(5, 11, requires_grad=True), torch.arange(5)
    kept = [[i, i + 1, i + 3] for i in range(5)] if truncated else None
    exact_logprobs(logits, ids, temperature=temperature, kept=kept).mul(
        torch.arange(1.0, 6.0)
    ).sum().backward()
    scores = (plain := logits.detach().clone().requires_grad_()) / temperature
    if kept is not None:
        support = torch.zeros(5, 11, dtype=torch.bool).scatter_(1, torch.tensor(kept), True)
        scores = scores.masked_fill(~support, -torch.inf)
    scores.log_softmax(-1)[torch.arange(5), ids].mul(torch.arange(1.0, 6.0)).sum().backward()
    torch.testing.assert_close(logits.grad, plain.grad)
