"""What a model asks of attention is read off its calls and its masks; what the engine does not do is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from myserve.engine.mixers.attention import Reach
from myserve.engine.mixers.attention_observer import AttentionObserver, reach_of_mask
from myserve.errors import UnsupportedModelError


@given(window=st.integers(1, 1 << 20))
@settings(max_examples=20, deadline=None)
def test_a_window_is_read_off_a_mask_whatever_its_length(window: int) -> None:
    assert reach_of_mask(sliding_window_causal_mask_function(window)) == Reach(window=window)


@given(chunk=st.integers(2, 1 << 20))
@settings(max_examples=20, deadline=None)
def test_so_is_a_chunk(chunk: int) -> None:
    function = chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.int64))
    assert reach_of_mask(function) == Reach(chunk=chunk)


def test_two_windows_are_the_smaller() -> None:
    both = and_masks(sliding_window_causal_mask_function(700), sliding_window_causal_mask_function(40))
    assert reach_of_mask(both) == Reach(window=40)


@pytest.mark.parametrize(
    "mask",
    [
        bidirectional_mask_function,
        # chunks and a window, and chunks that begin elsewhere
        and_masks(
            chunked_causal_mask_function(64, torch.zeros(1, dtype=torch.int64)),
            sliding_window_causal_mask_function(40),
        ),
        chunked_causal_mask_function(64, torch.ones(1, dtype=torch.int64)),
        or_masks(
            sliding_window_causal_mask_function(8), lambda b, h, q, kv: kv == 0
        ),  # a window, and the first token
        or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 9, dtype=torch.int64))),
        lambda b, h, q, kv: (kv <= q) & (kv % 2 == 0),
        lambda b, h, q, kv: kv < 0,
    ],
)
def test_a_mask_that_is_no_window_is_found_out(mask: object) -> None:
    assert reach_of_mask(mask) is None


def observe(mask: torch.Tensor | None, window: int = 0, keys: int = 3) -> AttentionObserver:
    observer = AttentionObserver("SomeModel")
    query, key, value = torch.ones(3, 4, 8), torch.ones(keys, 2, 8), torch.ones(keys, 2, 6)
    options = {"scale": 1.0, "window": window, "chunk": 0, "softcap": 0.0, "sinks": None}
    out = observer.attend(torch.nn.Identity(), query, key, value, mask, options)
    assert out.shape == (3, 4, 6)
    return observer


def mask_of(observer: AttentionObserver, function: object) -> torch.Tensor | None:
    return observer.mask({"batch_size": 1, "q_length": 3, "kv_length": 3, "mask_function": function})


def test_the_mask_decides_on_the_window_and_the_argument_where_there_is_none() -> None:
    made = mask_of(AttentionObserver("SomeModel"), sliding_window_causal_mask_function(40))
    assert observe(made).calls[0].window == 40
    assert (
        observe(mask_of(AttentionObserver("SomeModel"), causal_mask_function), window=9).calls[0].window == 0
    )
    assert observe(None, window=9).calls[0].window == 9
    (call,) = observe(None).calls
    assert (call.heads, call.kv_heads, call.key_dim, call.value_dim) == (4, 2, 8, 6)


def test_what_is_no_window_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="SomeModel gives its attention a mask of its own"):
        observe(torch.zeros(1, 1, 3, 3))
    with pytest.raises(UnsupportedModelError, match="SomeModel attends over other keys"):
        observe(None, keys=4)
    with pytest.raises(UnsupportedModelError, match="SomeModel hides other positions"):
        observe(mask_of(AttentionObserver("SomeModel"), bidirectional_mask_function))


def test_a_mask_that_no_layer_uses_is_no_reason() -> None:
    """Qwen2-MoE builds one of a window of 0 where it has none."""
    observer = AttentionObserver("SomeModel")
    assert mask_of(observer, sliding_window_causal_mask_function(0)) is not None
    assert not observer.calls
