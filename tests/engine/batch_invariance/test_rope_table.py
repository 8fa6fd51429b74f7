"""Angles that are looked up are those that the model computes, and nobody's company changes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from myserve import exact_forward, exact_logprobs
from myserve.core.params import SamplingParams
from myserve.engine.batch_invariance import rope_table
from myserve.engine.batch_invariance.rope_table import look_up_angles
from myserve.engine.engine import Engine
from myserve.engine.outputs import TokenOutput
from myserve.errors import RequestError
from runs import Asked, run

STATIC: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def llama(rope: dict[str, Any]) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, rope_parameters=rope,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


@pytest.mark.parametrize("rope", STATIC, ids=lambda rope: str(rope["rope_type"]))
@torch.inference_mode()
def test_every_position_has_the_bits_of_the_model(monkeypatch: pytest.MonkeyPatch, rope: Any) -> None:
    monkeypatch.setattr(rope_table, "CHUNK", 48)  # several, the last of them not full
    model = llama(rope)
    positions, x = torch.randint(128, (1, 200)), torch.zeros(1, 200, 32, dtype=torch.bfloat16)
    own = model.model.rotary_emb(x, positions)
    assert look_up_angles(model, 128) == 1
    ours = model.model.rotary_emb(x, positions)
    assert all(map(torch.equal, own, ours))
    beside = model.model.rotary_emb(x, (positions + 1) % 128)
    assert not any(map(torch.equal, own, beside)), "the control"


@torch.inference_mode()
def test_each_type_of_layer_has_its_own() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=kinds,
    )  # fmt: skip
    model: Any = Gemma3ForCausalLM(config)
    positions, x = torch.arange(40)[None], torch.zeros(1, 40, 8)
    own = [model.model.rotary_emb(x, positions, kind) for kind in kinds]
    look_up_angles(model, 64)
    for kind, angles_of_kind in zip(kinds, own, strict=True):
        assert all(map(torch.equal, angles_of_kind, model.model.rotary_emb(x, positions, kind)))
    assert not torch.equal(own[0][0], own[1][0])


@torch.inference_mode()
def test_angles_that_follow_the_longest_of_a_call_no_longer_do() -> None:
    """Otherwise a long request would change the numbers of those that it shares a step with."""
    x, short, long = (
        torch.zeros(1, 1, 32, dtype=torch.bfloat16),
        torch.tensor([[5]]),
        torch.tensor([[5, 500]]),
    )
    theirs = llama(DYNAMIC).model.rotary_emb
    assert not torch.equal(theirs(x, short)[0][0, 0], theirs(x, long)[0][0, 0]), "the control"
    model = llama(DYNAMIC)
    look_up_angles(model, 512)
    ours = model.model.rotary_emb
    assert torch.equal(ours(x, short)[0][0, 0], ours(x, long)[0][0, 0])
    served_short = llama(DYNAMIC)
    look_up_angles(served_short, 128)
    own = llama(DYNAMIC).model.rotary_emb(x, short)
    assert torch.equal(served_short.model.rotary_emb(x, short)[0], own[0])


def test_a_trainer_is_told_where_its_table_ends() -> None:
    model = llama(STATIC[0])
    x, near, far = torch.zeros(2, 1, 8).bfloat16(), torch.tensor([[15], [3]]), torch.tensor([[15], [16]])
    own = model.model.rotary_emb(x, near)
    look_up_angles(model, 16)
    assert all(map(torch.equal, own, model.model.rotary_emb(x, near)))
    with pytest.raises(RequestError, match=r"position 16 is beyond max_model_len \(16\)"):
        model.model.rotary_emb(x, far)


def logprobs(model: Any, prompt: list[int], tokens: Sequence[TokenOutput]) -> list[float]:
    ids = torch.tensor([token.token_id for token in tokens])
    logits = model(torch.tensor([prompt + ids.tolist()]), use_cache=False).logits[0]
    values: list[float] = exact_logprobs(logits[len(prompt) - 1 : -1], ids).tolist()
    return values


def test_longrope_is_served_as_far_as_short_texts_angles_reach(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine("longrope")
    assert engine.max_model_len == 64
    prompt = [5, 7, 100, 200, 33]
    drawn = run(engine, [Asked(prompt, SamplingParams(max_tokens=40, seed=3))])[0][0]
    trainer = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model("longrope")))
    assert logprobs(trainer, prompt, drawn.tokens) == [token.logprob for token in drawn.tokens]
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model("longrope"))
    wanted = [token.logprob for token in drawn.tokens]
    assert logprobs(theirs, prompt, drawn.tokens) == pytest.approx(wanted, abs=1e-4), "transformers' own"


def test_longrope_beyond_that_has_one_set_of_angles_for_every_length(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Engine]
) -> None:
    """Not those of whoever shares the step; and a trainer that is told the length has them too."""
    engine = make_engine("longrope", max_model_len=256)
    short, long = [5, 7, 100, 200, 33], [i % 300 for i in range(3, 150)]
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    alone = run(engine, [Asked(short, params)])[0][0]
    company = run(engine, [Asked(long, params), Asked(short, params)])
    assert company[1][0].numbers == alone.numbers
    model = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model("longrope")), max_model_len=256)
    for prompt, completion in [(short, alone), (long, company[0][0])]:
        wanted = [token.logprob for token in completion.tokens]
        assert logprobs(model, prompt, completion.tokens) == wanted
    untold = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model("longrope")))
    assert logprobs(untold, short, alone.tokens) != pytest.approx(
        [token.logprob for token in alone.tokens], abs=1e-2
    ), "the control"
