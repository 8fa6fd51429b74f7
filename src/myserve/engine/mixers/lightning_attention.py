"""Lightning attention (MiniMax-Text-01): a recurrence that transformers writes into its layer, made a function there.

Its layer computes prompts by blocks and single tokens by another loop, in its forward. Inside of a mode ours runs in
its place: the layer's own projections, activation, norm and gate, in its order, and the recurrence as one call. Outside
of one the layer's forward runs as it is, and so the self-test compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from myserve.engine.mixers.attention_pass import current_mode
from myserve.engine.mixers.recurrent import Mixing, Recurrence
from myserve.engine.mixers.recurrent_call import Arguments, RecurrentCall, RecurrentFunction

__all__ = ["NAME", "is_lightning_attention", "lightning_attention", "stand_in_the_layers"]

NAME = "lightning_attention"  # what calls of it are called
_CLASS = "MiniMaxLightningAttention"


def lightning_attention(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, block_size: int
) -> Tensor:
    """Return what queries read of a state that decays by exp(-slope) at each token, by blocks, with gradients.

    query, key [B, T, H, K], value [B, T, H, V], slope_rate [H, 1, 1]; gives [B, T, H, V]. The layer's own formula
    (Qin et al., arXiv:2405.17381).

    >>> one = torch.ones(1, 3, 1, 1)
    >>> lightning_attention(one, one, one, torch.full((1, 1, 1), 0.6931472), 2).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, T, ...]
    state = value.new_zeros(*value.shape[:2], key.shape[3], value.shape[3])
    parts = []
    for start in range(0, value.shape[2], block_size):
        q, k, v = (x[:, :, start : start + block_size] for x in (query, key, value))
        count = q.shape[2]
        place = torch.arange(1, count + 1, device=q.device)[:, None]
        since = (place - place.T).clamp(min=0)
        scores = (q @ k.transpose(-1, -2)) * torch.exp(-slope_rate * since).tril()
        parts.append(scores @ v + (q * torch.exp(-slope_rate * place)) @ state)
        taken = (k * torch.exp(-slope_rate * (count - place))).transpose(-1, -2) @ v
        state = torch.exp(-slope_rate * count) * state + taken
    return torch.cat(parts, dim=2).transpose(1, 2)


def _recurrence(a: Arguments) -> Mixing:
    rows, heads = a["query"].shape[:2]
    decay = -a["slope_rate"].float().flatten().expand(rows, heads)
    beta = torch.ones(rows, heads)
    return Recurrence(a["query"], a["key"], a["value"], decay, beta, scale=1.0, is_delta=False)


_FUNCTION = RecurrentFunction(("query", "key", "value"), 1, _recurrence, lambda mixed: mixed)


def is_lightning_attention(module: nn.Module) -> bool:
    """Return whether a module is transformers' layer of lightning attention.

    >>> is_lightning_attention(nn.Linear(1, 1))
    False
    """
    return type(module).__name__ == _CLASS and type(module).__module__.startswith("transformers.")


def stand_in_the_layers(model: nn.Module) -> None:
    """Put ours in place of the forward of the model's classes of lightning attention, once for the whole process."""
    for kind in {type(module) for module in model.modules() if is_lightning_attention(module)}:
        if not hasattr(kind.forward, "stands_before"):
            kind.forward = _before(kind.forward)


def _before(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        mode = current_mode()
        if mode is None:
            return theirs(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        mixed = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
        heads = mixed.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim))
        rows = dict(zip(_FUNCTION.rows, heads.split(self.head_dim, dim=-1), strict=True))  # [B, T, H, D] each
        others = {"slope_rate": self.slope_rate, "block_size": self.block_size}
        out = mode.mix(RecurrentCall(NAME, _FUNCTION, rows | others, lightning_attention))
        out = self.norm(out.flatten(-2))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * out), None

    forward.stands_before = theirs  # type: ignore[attr-defined]  # so that it is put there once
    return forward
