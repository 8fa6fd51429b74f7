"""Ours stand before the functions of transformers' files: they answer inside of a mode, and hand on outside of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_5 import modeling_qwen3_5 as file

from model_zoo import SERVED
from myserve.engine.mixers.attention_observer import AttentionObserver
from myserve.engine.mixers.attention_pass import using
from myserve.engine.mixers.recurrent_call import RecurrentCall
from myserve.engine.mixers.recurrent_functions import FUNCTIONS, calls_functions, stand_before


@pytest.fixture
def model() -> nn.Module:
    arch, config = SERVED["qwen3_5_text"]
    made: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **config))
    stand_before(made)
    return made


def test_outside_of_a_mode_theirs_are_called_with_what_was_given(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = file.causal_conv1d_fn
    x, weight = torch.randn(2, 3, 5), torch.randn(3, 4)
    assert torch.equal(ours(x, weight, activation="silu"), ours.stands_before(x, weight, activation="silu"))
    x.requires_grad_()
    ours(x, weight).sum().backward()
    assert x.grad is not None
    stand_before(model)
    assert file.causal_conv1d_fn is ours, "they stand there once"


def test_inside_of_a_mode_ours_answer(model: nn.Module) -> None:
    x, weight = torch.randn(1, 3, 5), torch.randn(3, 4)
    theirs = file.causal_conv1d_fn(x, weight)
    with using(observer := AttentionObserver("SomeModel")):
        mixed = file.causal_conv1d_fn(x, weight=weight, bias=None, seq_idx=None)
    assert mixed.shape == theirs.shape and torch.allclose(mixed, theirs, atol=1e-6)
    assert [(s.name, s.state.shape) for s in observer.states] == [("causal_conv1d_fn", (3, 3))]
    with using(observer), pytest.raises(ValueError, match="gelu behind it is not computed"):
        file.causal_conv1d_fn(x, weight, activation="gelu")


def test_the_layers_that_call_them_are_found(model: nn.Module) -> None:
    found = {type(module).__name__ for module in model.modules() if calls_functions(module)}
    assert found == {"Qwen3_5GatedDeltaNet"}


def test_a_call_has_its_rows_packed_and_theirs_as_the_judge() -> None:
    x, weight = torch.randn(2, 3, 5), torch.randn(3, 4)
    theirs = file.causal_conv1d_fn
    call = RecurrentCall(
        "causal_conv1d_fn", FUNCTIONS["causal_conv1d_fn"], {"hidden_states": x, "weight": weight}, theirs
    )
    assert call.size == (2, 5)
    rows = x.movedim(2, 1)
    assert torch.equal(call.compute_theirs({"hidden_states": rows}, {}), theirs(x, weight).movedim(2, 1))
    assert torch.equal(call.unpacked(rows), x)
