"""A trainer's logprobs with the engine's bits: from logits to the number that the server returned, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from myserve.core.logprobs import normalisers

__all__ = ["exact_logprobs"]


def exact_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    kept: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Return the log-softmax of `logits` [N, V] at `token_ids` [N] (int64): float32 [N], in nats, with gradients.

    With the logits of an `exact_forward` model these are, bit for bit, the server's logprobs; with the `temperature`
    of the draw (above 0), its sampling logprobs. `kept` gives each row's support, token ids, where the draw was
    truncated (top-p, top-k, min-p; the server answers `kept` when asked): the distribution is then the one over the
    support, and a token outside of it has -inf. PyTorch's own `log_softmax` differs in last bits with the number of
    rows and threads.

    Raises `IndexError` or `RuntimeError`, PyTorch's own, for token ids outside of the vocabulary.

    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> exact_logprobs(logits, torch.tensor([1, 2]), kept=[[1], [2, 3]]).exp().tolist()
    [1.0, 0.5]
    """
    scores = logits.float()
    if temperature != 1.0:
        scores = scores / temperature
    if kept is not None:
        scores = scores.masked_fill(_outside(kept, scores.shape), -torch.inf)
    out: Tensor = _ExactLogprobs.apply(scores, token_ids)  # type: ignore[no-untyped-call]
    return out


def _outside(kept: Sequence[Sequence[int]], shape: torch.Size) -> Tensor:
    outside = torch.ones(shape, dtype=torch.bool)
    rows = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(ids) for ids in kept]))
    outside[rows, torch.tensor([token_id for ids in kept for token_id in ids])] = False
    return outside


class _ExactLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, token_ids: Tensor) -> Tensor:
        ctx.save_for_backward(scores, token_ids)
        drawn = scores.gather(-1, token_ids[:, None])[:, 0].tolist()
        rows = zip(normalisers(scores), drawn, strict=True)
        return torch.tensor([normaliser.logprob(score) for normaliser, score in rows], dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scores, token_ids = ctx.saved_tensors
        grads = scores.softmax(-1).mul_(-grad[:, None])
        return grads.scatter_add_(-1, token_ids[:, None], grad[:, None]), None
