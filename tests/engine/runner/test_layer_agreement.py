"""A model that is so sensitive that its logits show nothing is judged by its layers, and wrong ones are found so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.mixers import attention, lightning_attention
from myserve.engine.mixers.recurrent import Recurrence
from myserve.engine.runner import self_test
from myserve.engine.runner.layer_agreement import correlation, layers_agree
from myserve.errors import UnsupportedModelError

HALF = EngineConfig(num_blocks=16, max_num_seqs=4, dtype="bfloat16", self_test="always")
each_arch = pytest.mark.parametrize("arch", ["minimax", "gemma3_text"])


@pytest.fixture
def by_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits are near enough."""
    monkeypatch.setattr(self_test, "AGREEMENT_HALF", 1.0)


def load(folder: Path) -> None:
    Engine.from_pretrained(str(folder), HALF).shutdown()


@each_arch
def test_layers_that_are_their_own_are_served(
    arch: str,
    tiny_model: Callable[[str], Path],
    by_layers_alone: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "myserve.engine.runner.self_test"):
        load(tiny_model(arch))
    for how in ("packed", "decoded"):
        assert any(f"other logits {how} than alone" in message for message in caplog.messages)


@each_arch
def test_control_a_window_that_is_not_the_models_is_found(
    arch: str, tiny_model: Callable[[str], Path], by_layers_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = attention.paged_attention
    monkeypatch.setattr(
        attention, "paged_attention", lambda *args, **options: honest(*args, **options | {"window": 4})
    )
    with pytest.raises(UnsupportedModelError, match="other logits"):
        load(tiny_model(arch))


def test_control_a_decode_that_forgets_its_prompt_is_found(
    tiny_model: Callable[[str], Path], by_layers_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = attention.paged_attention

    def forgets(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return honest(query, *args, **options | ({"window": 1} if query.shape[0] == 1 else {}))

    monkeypatch.setattr(attention, "paged_attention", forgets)
    with pytest.raises(UnsupportedModelError, match="other logits"):
        load(tiny_model("gemma3_text"))


def test_control_states_that_decay_faster_are_found(
    tiny_model: Callable[[str], Path], by_layers_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = lightning_attention._FUNCTION

    def faster(arguments: Any) -> Any:
        recurrence = honest.mixing(arguments)
        assert isinstance(recurrence, Recurrence)
        return replace(recurrence, decay=2 * recurrence.decay)

    monkeypatch.setattr(lightning_attention, "_FUNCTION", replace(honest, mixing=faster))
    with pytest.raises(UnsupportedModelError, match="other logits"):
        load(tiny_model("minimax"))


def test_in_float32_logits_must_agree(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "AGREEMENT", {torch.float32: 1.1})
    with pytest.raises(UnsupportedModelError, match="other logits"):
        Engine.from_pretrained(str(tiny_model("llama")), EngineConfig(num_blocks=16, dtype="float32"))


class Layer(GradientCheckpointingLayer):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 1


def test_a_model_without_layers_or_with_other_ones_is_not_judged() -> None:
    assert not layers_agree(nn.Linear(1, 1), [], [[1, 2]], lambda _: None, lambda _: None)
    model = nn.Sequential(Layer())
    own = lambda _: model(torch.zeros(1, 2, 3))  # noqa: E731
    assert not layers_agree(model, [model[0]], [[1, 2]], own, lambda _: None), "no step was run"
    assert not layers_agree(model, [model[0]], [[1, 2]], lambda _: model(None), lambda _: None)


def test_correlation_is_of_rows_about_their_own_mean() -> None:
    x = torch.randn(4, 9)
    assert correlation(x, 2 * x + torch.arange(4.0)[:, None]) == pytest.approx(1)
    assert correlation(x, -x) == pytest.approx(-1)
