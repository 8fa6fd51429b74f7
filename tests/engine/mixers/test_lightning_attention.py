"""Lightning attention: the layer's own numbers, by ours inside of a mode and by its own forward outside of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from model_zoo import SERVED
from myserve.engine.mixers.attention_observer import AttentionObserver
from myserve.engine.mixers.attention_pass import using
from myserve.engine.mixers.lightning_attention import NAME, lightning_attention, stand_in_the_layers


@pytest.fixture
def layer() -> MiniMaxLightningAttention:
    arch, config = SERVED["minimax"]
    made = MiniMaxLightningAttention(AutoConfig.for_model(arch, **config), layer_idx=0)
    stand_in_the_layers(made)
    return made.eval()


@torch.no_grad()
def test_inside_of_a_mode_ours_answer_with_the_layers_own_numbers(layer: MiniMaxLightningAttention) -> None:
    x = torch.randn(1, 45, 32)  # blocks of 16, and a part of one
    theirs, _ = layer(x, None, None)
    with using(observer := AttentionObserver("SomeModel")):
        ours, _ = layer(x, position_embeddings=None, attention_mask=None)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.equal(ours, theirs)
    assert [(call.name, call.state.shape) for call in observer.states] == [(NAME, (4, 1, 8, 16))]


@torch.no_grad()
def test_outside_of_one_the_layers_own_forward_runs(layer: MiniMaxLightningAttention) -> None:
    x = torch.randn(2, 20, 32)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :7] = 0
    own = type(layer).forward.stands_before
    assert torch.equal(layer(x, None, mask)[0], own(layer, x, None, mask)[0])
    before = type(layer).forward
    stand_in_the_layers(layer)
    assert type(layer).forward is before, "ours stand there once"


def test_by_blocks_of_any_size_it_is_the_sum_by_its_definition() -> None:
    query, key, value = torch.randn(3, 2, 21, 3, 5, dtype=torch.float64)
    slopes = torch.tensor([0.7, 0.1, 0.01], dtype=torch.float64).view(3, 1, 1)

    def row(t: int) -> Tensor:  # [B, H, V]
        kept = torch.exp(-slopes[:, 0, 0] * (t - torch.arange(t + 1))[:, None])  # [t + 1, H]
        scores = (query[:, t, None] * key[:, : t + 1]).sum(-1) * kept
        return (scores[..., None] * value[:, : t + 1]).sum(1)

    wanted = torch.stack([row(t) for t in range(21)], dim=1)
    for size in (1, 4, 21, 64):
        torch.testing.assert_close(lightning_attention(query, key, value, slopes, size), wanted)
