"""A layer that counts its tokens itself computes each by its position: packed, padded on the left, behind a cache."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model_zoo import SERVED
from myserve.engine.mixers.row_positions import tell_positions

IDS = [(5 + 11 * i) % 380 for i in range(40)]  # positions scale from 16 on


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The same model, transformers' own and told."""
    torch.manual_seed(0)
    arch, config = SERVED["llama4_text"]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **config)).eval()
    told = deepcopy(theirs)
    assert (tell_positions(told), tell_positions(told)) == (2, 0)  # both layers, once
    return theirs, told


@torch.inference_mode()
def test_sequences_behind_one_another_are_those_that_are_alone(models: tuple[Any, Any]) -> None:
    theirs, told = models
    wanted = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in (IDS, IDS[:25])])
    packed = torch.tensor([IDS + IDS[:25]])
    positions = torch.tensor([[*range(40), *range(25)]])
    arguments = {"position_ids": positions, "use_cache": False}
    torch.testing.assert_close(told(packed, **arguments).logits[0], wanted, rtol=1e-4, atol=1e-4)
    own = theirs(packed, **arguments).logits[0]  # the control
    assert not torch.allclose(own, wanted, atol=1e-2) and torch.allclose(own[:40], wanted[:40], atol=1e-4)


@torch.inference_mode()
def test_padded_on_the_left_and_decoded_behind_a_cache(models: tuple[Any, Any]) -> None:
    theirs, told = models
    ids = torch.tensor([IDS, [0] * 15 + IDS[:25]])
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    wanted = theirs(torch.tensor([IDS[:25]])).logits[0]
    torch.testing.assert_close(told(ids, **padded).logits[1, 15:], wanted, rtol=1e-4, atol=1e-4)
    first = told(torch.tensor([IDS[:30]]))
    rest = told(torch.tensor([IDS[30:]]), past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest[0], theirs(torch.tensor([IDS])).logits[0, 30:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="are computed whole"):
        told(ids, **padded, past_key_values=told(torch.tensor([IDS] * 2)).past_key_values)
