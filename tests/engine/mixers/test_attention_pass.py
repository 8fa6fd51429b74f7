"""A forward pass makes the calls of attention that it was observed to make, or raises before memory is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from myserve.engine.mixers.attention import PagedContext, allocate_layer
from myserve.engine.mixers.attention_observer import AttentionObserver
from myserve.engine.mixers.attention_pass import AttentionCall, _attention_forward, attending, using

HERE, OTHER = nn.Identity(), nn.Identity()


def context(layers: int) -> PagedContext:
    caches = [allocate_layer(1, 2, 8, torch.float32) for _ in range(layers)]
    one = torch.ones(1, dtype=torch.int32)
    return PagedContext(
        caches, torch.tensor([0]), one[None] * 0, torch.tensor([0, 1], dtype=torch.int32), one
    )


def call(module: nn.Module, heads: int = 4, dim: int = 8) -> torch.Tensor:
    query, key = torch.ones(1, heads, 1, dim), torch.ones(1, 2, 1, dim)
    return _attention_forward(module, query, key, key, None)[0]


def test_each_call_has_a_cache_of_its_own_though_one_layer_makes_both() -> None:
    pages, calls = context(2), [AttentionCall(HERE, 4, 2, 8, 8, 0)] * 2
    with attending(pages, calls):
        assert call(HERE).shape == (1, 1, 4, 8)
        assert pages.layers[0][0].any() and not pages.layers[1][0].any()
        call(HERE)
    assert pages.layers[1][0].any()


def test_what_is_attended_can_be_flattened_by_view_as_transformers_own() -> None:
    """AFMoE and JetMoE do so; a step, the observer, and values that are narrower than keys."""
    query, key, value = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 6)
    for values in (key, value):
        with using(AttentionObserver("SomeModel")):
            assert _attention_forward(HERE, query, key, values, None)[0].view(1, 3, -1).shape[1] == 3
    three = torch.tensor([3], dtype=torch.int32)
    pages = PagedContext(
        [allocate_layer(1, 2, 8, torch.float32)],
        torch.arange(3),
        three[None] * 0,
        torch.tensor([0, 3], dtype=torch.int32),
        three,
    )
    with attending(pages, [AttentionCall(HERE, 4, 2, 8, 6, 0)]):
        assert _attention_forward(HERE, query, key, value, None)[0].view(1, 3, -1).shape[2] == 24


def test_other_calls_than_were_observed_raise() -> None:
    calls = [AttentionCall(HERE, 4, 2, 8, 8, 0)]
    with pytest.raises(RuntimeError, match="made 0 calls"), attending(context(1), calls):
        pass
    for wrong in (lambda: call(OTHER), lambda: call(HERE, heads=2), lambda: call(HERE, dim=16)):
        with pytest.raises(RuntimeError, match="not observed"), attending(context(1), calls):
            wrong()
    with pytest.raises(RuntimeError, match="more often"), attending(context(1), calls):
        call(HERE)
        call(HERE)
    with (
        pytest.raises(RuntimeError, match="1 calls of attention have 2 caches"),
        attending(context(2), calls),
    ):
        pass


def test_outside_of_a_step_nothing_attends() -> None:
    with pytest.raises(RuntimeError, match="attending"):
        call(HERE)
