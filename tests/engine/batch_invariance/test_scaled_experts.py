"""Experts whose inputs are weighted give what transformers' own layer gives, in any crowd, of their tokens alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model_zoo import SERVED
from myserve.engine.batch_invariance.patch import make_exact
from myserve.engine.batch_invariance.scaled_experts import adopt_scaled_experts


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    arch, config = SERVED["llama4_text-odd"]  # two experts a token
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **config)).eval()


@torch.inference_mode()
def test_a_layer_gives_transformers_numbers_and_a_tokens_bits_are_its_own(model: Any) -> None:
    theirs = deepcopy(model.model.layers[0].feed_forward)
    make_exact(model)
    ours, x = model.model.layers[0].feed_forward, torch.randn(70, 36)
    (out, logits), (wanted, wanted_logits) = ours(x[None]), theirs(x[None])
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(logits, wanted_logits)
    assert torch.equal(torch.cat([ours(row[None, None])[0] for row in x]), out)


@torch.inference_mode()
def test_an_expert_multiplies_its_own_tokens_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_exact(model)
    experts, seen = model.model.layers[0].feed_forward.experts, list[int]()
    for packed in experts.packed_up:
        honest = packed._multiply
        monkeypatch.setattr(packed, "_multiply", lambda x, out, h=honest: (seen.append(len(out)), h(x, out)))
    model.model.layers[0].feed_forward(torch.randn(1, 11, 36))
    assert sum(seen) == 2 * 11  # and not 4 * 11


def test_it_is_done_once_and_to_no_other_mixture(model: Any) -> None:
    assert adopt_scaled_experts(model) == 2
    assert adopt_scaled_experts(model) == 0
    arch, config = SERVED["deepseek_v3"]
    assert adopt_scaled_experts(AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **config))) == 0
