"""Attention in a trainer runs forward by the engine's kernel and backward by PyTorch, on packed rows.

A sequence has query rows of its own and sees a context, which may begin with rows of another: a prompt that many
completions share has its keys and values computed once, as in the engine's cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from myserve.engine.kernels.attend import BLOCK_SIZE
from myserve.engine.mixers.attention import Reach, allocate_layer, dense_attention, paged_attention, store_kv

__all__ = ["TRAINER_NAME", "Spans", "register_exact_attention", "sharing", "spans_of"]

_REACH = "_myserve_reach"  # the attribute of a mask
TRAINER_NAME = "myserve_trainer"  # attention and experts, as a model's config says them


def register_exact_attention() -> None:
    """Make `attn_implementation="myserve_trainer"` known to transformers."""
    AttentionInterface.register(TRAINER_NAME, _attention_forward)
    AttentionMaskInterface.register(TRAINER_NAME, _real_rows)


def _real_rows(
    *,
    batch_size: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The rows [B, 1, 1, T] that are no padding, None for all; marked with the reach where the model's mask has one.

    Some models have it there alone, and give their attention no `sliding_window` (Qwen2-MoE). The shape is that of any
    mask, for some models take slices of it (Gemma 4).
    """
    if local_size is None:
        return None if attention_mask is None else attention_mask[:, None, None]
    real = (
        torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool)
        if attention_mask is None
        else attention_mask[:, None, None].clone()
    )
    setattr(real, _REACH, _reach_of(local_size, config))
    return real


def _reach_of(local_size: int, config: Any) -> Reach:
    """A mask's local size is a window's or a chunk's: its config says which, for a padded mask cannot be asked.

    Raises ValueError where a config has both of one size.
    """
    if local_size != getattr(config, "attention_chunk_size", None):
        return Reach(window=local_size)
    if local_size == getattr(config, "sliding_window", None):
        raise ValueError(
            f"{config.model_type} has windows and chunks of {local_size}: which is meant is not told"
        )
    return Reach(chunk=local_size)


class Spans:
    """Packed rows [T] cut into sequences: S spans behind one another, each the last rows of a context of its own.

    All layers share one, so what the kernel needs of it is computed once.

    >>> prompt_and_token = Spans([2, 1], [torch.tensor([0, 1]), torch.tensor([0, 1, 2])])
    >>> [(rows.tolist(), contexts.tolist()) for rows, contexts in prompt_and_token.by_shape]
    [([[2]], [[0, 1, 2]]), ([[0, 1]], [[0, 1]])]
    """

    def __init__(self, lengths: Sequence[int], contexts: Sequence[Tensor]) -> None:
        """`lengths`: rows of each span. `contexts`: the rows that it sees, in order, its own last; int64 [K] each."""
        self.query_start = torch.tensor([0, *lengths]).cumsum(0)
        self.lengths, self.contexts = lengths, contexts
        self.context_rows = torch.cat(list(contexts))  # [sum of K]
        self.was_dropped = False  # whether a layer was called without them

    @classmethod
    def of_whole(cls, lengths: Sequence[int]) -> Spans:
        """Return the spans of sequences that see themselves alone, of `lengths` rows each."""
        return cls(lengths, torch.split(torch.arange(sum(lengths)), list(lengths)))

    @cached_property
    def blocks(self) -> tuple[Tensor, Tensor, int]:
        """The cache of one layer: the slot of each context row, the table [S, blocks] int32, how many blocks."""
        counts = [-(-len(context) // BLOCK_SIZE) for context in self.contexts]
        starts = torch.tensor([0, *counts]).cumsum(0)
        sizes = torch.tensor([len(context) for context in self.contexts])
        first = sizes.cumsum(0) - sizes
        offset = torch.arange(len(self.context_rows)) - first.repeat_interleave(sizes)
        slots = (starts[:-1] * BLOCK_SIZE).repeat_interleave(sizes) + offset
        tables = (starts[:-1, None] + torch.arange(max(counts))).clamp(max=sum(counts) - 1).int()
        return slots, tables, sum(counts)

    @cached_property
    def by_shape(self) -> list[tuple[Tensor, Tensor]]:
        """Spans of one shape together, as rows [B, Q] and contexts [B, K].

        A batch of rollouts is many short ones, and a graph each costs more than the arithmetic.
        """
        shapes = [(length, len(context)) for length, context in zip(self.lengths, self.contexts, strict=True)]
        groups = []
        for shape in sorted(set(shapes)):
            members = [s for s, other in enumerate(shapes) if other == shape]
            rows = self.query_start[members, None] + torch.arange(shape[0])
            groups.append((rows, torch.stack([self.contexts[s] for s in members])))
        return groups


class _Call(threading.local):
    spans: Spans | None = None


_call = _Call()


@contextmanager
def sharing(spans: Spans) -> Iterator[None]:
    """Let the layers of a call have its spans, also where a model hands no keywords down (Mamba-2, Nemotron)."""
    _call.spans = spans
    try:
        yield
    finally:
        _call.spans = None


def spans_of(given: Spans | None) -> Spans | None:
    """Return the spans that a layer is given, or those of the call at hand."""
    if given is None and _call.spans is not None:
        _call.spans.was_dropped = True
        return _call.spans
    return given


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Spans | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend: query [B, H, T, D], key and value [B, Hkv, T, D]; gives [B, T, H, D].

    The rows are those of `spans`, packed [1, T]; or whole sequences, padded, attention_mask [B, 1, 1, T] or None.
    Raises ValueError where the model leaves positions out.
    """
    batch, length, head_dim = query.shape[0], *query.shape[2:]
    options: dict[str, Any] = {
        "scale": head_dim**-0.5 if scaling is None else scaling,
        "softcap": softcap or 0.0,
        **getattr(attention_mask, _REACH, Reach(sliding_window or 0))._asdict(),
    }
    rows = [x.transpose(1, 2) for x in (query, key, value)]  # [B, T, heads, D]
    if (spans := spans_of(spans)) is not None:
        return _attend([x[0] for x in rows], s_aux, spans, options).contiguous()[None], None
    if key.shape[2] != length:
        raise ValueError(
            f"{type(module).__name__} asks for {length} of {key.shape[2]} positions; call the model without "
            "logits_to_keep, and take the logits that you want"
        )
    real = torch.ones(batch, length, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask.reshape(batch, length).bool()
    out = _attend([x[real] for x in rows], s_aux, Spans.of_whole(real.sum(1).tolist()), options)
    padded = out.new_zeros(batch, length, query.shape[1], out.shape[2])
    return padded.masked_scatter(real[..., None, None], out), None


def _attend(qkv: list[Tensor], sinks: Tensor | None, spans: Spans, options: dict[str, Any]) -> Tensor:
    out: Tensor = _ExactAttention.apply(*qkv, sinks, spans, options)  # type: ignore[no-untyped-call]
    return out


class _ExactAttention(torch.autograd.Function):
    """Packed: [T, heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, spans: Spans,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(query, key, value, sinks)
        ctx.spans, ctx.options = spans, options
        slots, tables, blocks = spans.blocks
        width = max(key.shape[2], value.shape[2])
        cache = allocate_layer(blocks, key.shape[1], width, key.dtype)
        # Each span has a copy of its context: a block that a prompt's end shares with a completion's begin would have
        # to be copied anyway, and the copies are small beside the products.
        store_kv(key[spans.context_rows], value[spans.context_rows], *cache, slots)
        lens = torch.tensor([len(context) for context in spans.contexts], dtype=torch.int32)
        return paged_attention(
            query,
            *cache,
            tables,
            spans.query_start.int(),
            lens,
            sinks=sinks,
            value_dim=value.shape[2],
            **options,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        # Sums over the completions that share a prompt are float32, whatever the model is.
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
        sink_grad = None if sinks is None else torch.zeros_like(sinks)
        for (rows, context), parts in _gradients(ctx.spans, query, key, value, sinks, grad, ctx.options):
            for total, at, part in zip(grads, (rows, context, context), parts, strict=False):
                total.index_add_(0, at.flatten(), part.flatten(0, 1).float())
            if sink_grad is not None:
                sink_grad += parts[3]
        typed = (total.to(x.dtype) for total, x in zip(grads, (query, key, value), strict=True))
        return *typed, sink_grad, None, None


def _gradients(
    spans: Spans, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, grad: Tensor,
    options: dict[str, Any],
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]]:  # fmt: skip
    """For the spans of each shape: their rows and contexts, and the gradients of queries, keys, values (and sinks)."""
    for rows, context in spans.by_shape:
        wanted = [query[rows], key[context], value[context], *([] if sinks is None else [sinks])]
        wanted = [x.detach().requires_grad_() for x in wanted]
        with torch.enable_grad():
            out = _dense_rows(wanted[:3], wanted[3] if sinks is not None else None, options)
            yield (rows, context), torch.autograd.grad(out, wanted, grad[rows])


def _dense_rows(qkv: list[Tensor], sinks: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Attention of B sequences: query [B, Q, H, D], key and value [B, K, Hkv, D]; gives [B, Q, H, D]."""
    batch, heads = len(qkv[0]), qkv[0].shape[2]
    # each sequence brings heads of its own
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in qkv)
    every = None if sinks is None else sinks.repeat(batch)
    out = dense_attention(query, key, value, sinks=every, **options)  # [B * H, Q, D]
    return out.reshape(batch, heads, *out.shape[1:]).transpose(1, 2)
