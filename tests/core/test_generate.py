"""Whole sequences, token for token, against `transformers.generate` on models of three architectures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from myserve.core.generate import greedy_generate, sample_generate
from myserve.core.sampling import RowState, Sampled, Sampler, SamplerCfg

ARCHITECTURES = ["gpt2", "llama", "qwen2"]
NEW_TOKENS = 48
# temperature, top_p, top_k
MIXES = [(1.0, 1.0, None), (0.7, 1.0, 50), (1.0, 0.9, None), (0.3, 0.95, 20), (2.0, 0.5, 100), (1.5, 0.99, 7)]


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model(request.param)).eval()


def prompt(seed: int, rows: int = 1) -> Tensor:
    return torch.randint(3, 384, (rows, 5), generator=torch.Generator().manual_seed(seed))


def theirs(model: PreTrainedModel, ids: Tensor, seed: int, **generation: object) -> Tensor:
    set_seed(seed)
    defaults: dict[str, object] = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": True,
        "top_k": 0,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 2,
        "eos_token_id": 2,
    }
    return model.generate(ids, **(defaults | generation))


@pytest.mark.parametrize("mix", MIXES)
def test_sample_generate_is_transformers_generate(
    model: PreTrainedModel, mix: tuple[float, float, int | None]
) -> None:
    temperature, top_p, top_k = mix
    cfg = SamplerCfg(temperature=temperature, top_p=top_p, top_k=top_k)
    for seed in (1234, 99):
        ids = prompt(seed)
        gen = torch.Generator().manual_seed(seed)
        ours, _ = sample_generate(model, ids, NEW_TOKENS, 2, cfg, gen)
        expected = theirs(model, ids, seed, temperature=temperature, top_p=top_p, top_k=top_k or 0)
        assert torch.equal(ours, expected)


def test_a_slightly_wrong_sampler_does_not_pass(model: PreTrainedModel) -> None:
    """The control of the test above: 5 % of temperature shows within a few sequences."""
    differ = 0
    for seed in range(5):
        cfg = SamplerCfg(temperature=1.05)
        ours, _ = sample_generate(
            model, prompt(seed), NEW_TOKENS, 2, cfg, torch.Generator().manual_seed(seed)
        )
        differ += not torch.equal(ours, theirs(model, prompt(seed), seed))
    assert differ > 0


def test_a_batch_pads_rows_that_have_ended_as_transformers_does(model: PreTrainedModel) -> None:
    ids = prompt(3, rows=6)
    eos = int(theirs(model, ids, 7)[2, 12])  # a token that one row is known to draw
    ours, _ = sample_generate(model, ids, NEW_TOKENS, eos, SamplerCfg(), torch.Generator().manual_seed(7))
    assert torch.equal(ours, theirs(model, ids, 7, eos_token_id=eos, pad_token_id=eos))
    assert int((ours[:, 5:] == eos).any(dim=1).sum()) >= 1


def test_greedy_is_transformers_greedy(model: PreTrainedModel) -> None:
    ids = prompt(0, rows=3)
    ours = greedy_generate(model, ids, NEW_TOKENS, 2)
    assert torch.equal(ours, theirs(model, ids, 0, do_sample=False, top_k=None))


def test_penalties_count_the_completion_and_not_the_prompt(model: PreTrainedModel) -> None:
    cfg = SamplerCfg(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    ids = prompt(0)
    first = sample_generate(model, ids, 1, None, cfg)[0]
    assert torch.equal(first, greedy_generate(model, ids, 1))  # nothing is out yet: nothing is penalised
    repeated = greedy_generate(model, ids, NEW_TOKENS)[0, 5:].unique().numel()
    assert sample_generate(model, ids, NEW_TOKENS, None, cfg)[0][0, 5:].unique().numel() >= repeated


def test_collected_logprobs_are_those_of_the_tokens(model: PreTrainedModel) -> None:
    ids = prompt(5, rows=2)
    cfg = SamplerCfg(temperature=0.8, top_k=4, top_logprobs=6)
    out, steps = sample_generate(model, ids, 6, None, cfg, torch.Generator().manual_seed(0), True)
    assert [[row["id"] for row in step] for step in steps] == out[:, 5:].T.tolist()
    for step in steps:
        for row in step:
            listed = dict(row["top_logprobs"])
            assert len(listed) == 4  # six were asked for, four are in the support: none at -inf
            assert listed[row["id"]] == row["logprob"]


ENGINE_MIXES = [
    {},
    {"temperature": 0.7, "top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05, "temperature": 1.4},
    {"typical_p": 0.8},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "temperature": 1.2},
]


def test_the_batched_sampler_on_torch_noise_is_transformers_generate(
    model: PreTrainedModel, make_row: Callable[..., RowState]
) -> None:
    """Seven requests with seven parameter sets side by side, each equal to its own `generate`."""
    prompts = [prompt(seed)[0].tolist() for seed in range(len(ENGINE_MIXES))]
    rows = [
        make_row(seed=seed, noise="torch", prompt=ids, vocab=384, eos=(2,), **mix)
        for seed, (ids, mix) in enumerate(zip(prompts, ENGINE_MIXES, strict=True))
    ]
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            logits = model(torch.tensor(prompts)).logits[:, -1, :]
        for ids, row, drawn in zip(prompts, rows, Sampler().sample(logits, rows), strict=True):
            assert isinstance(drawn, Sampled)
            row.append(drawn.token_id)
            ids.append(drawn.token_id)
    for seed, (ids, mix) in enumerate(zip(prompts, ENGINE_MIXES, strict=True)):
        expected = theirs(model, prompt(seed), seed, **mix)[0].tolist()
        assert ids[: len(expected)] == expected


def test_a_generator_may_be_the_global_one(model: PreTrainedModel) -> None:
    set_seed(11)
    ours, _ = sample_generate(model, prompt(1), 8, None, SamplerCfg())
    again, _ = sample_generate(model, prompt(1), 8, None, SamplerCfg(), torch.Generator().manual_seed(11))
    assert torch.equal(ours, again)


def test_any_module_that_gives_logits_will_do() -> None:
    class Counter(torch.nn.Module):
        def forward(self, ids: Tensor) -> object:
            logits = torch.nn.functional.one_hot(ids + 1, 10).float() * 100
            return type("Output", (), {"logits": logits})

    out = greedy_generate(Counter(), torch.tensor([[1, 2], [4, 5]]), 3, eos_token_id=8)
    assert out.tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8]]
    assert list(itertools.pairwise(out[0].tolist()))[-1] == (4, 5)
