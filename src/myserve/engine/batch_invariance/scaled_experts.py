"""Experts whose inputs are weighted by the router, and not their outputs, compute their own tokens alone (Llama 4's).

transformers gives each of these experts every token, times a score that is 0 where the expert was not chosen, by one
product that is none of ours. They have no bias, so an input of zeros gives zeros: the chosen tokens alone are the same
numbers. They become experts as other mixtures have them, which are looked up by name (`patch.exact_experts_forward`),
so that their routing is captured and replayed, and their weights are packed, exchanged and adapted, like those.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

__all__ = ["adopt_scaled_experts", "weighted"]

# what a layer's forward does where its experts are of this kind
_SCALES = "routed_in = routed_in * router_scores.transpose(0, 1)"
_PARTS = {"experts", "router", "shared_expert"}


def adopt_scaled_experts(model: Any) -> int:
    """Make such experts of a model, in place, experts that are looked up by name; return how many there were.

    >>> adopt_scaled_experts(nn.Linear(1, 1))
    0
    """
    found: list[Any] = [module for module in model.modules() if _scales_inputs(module)]
    for layer in found:
        experts = layer.experts
        experts.config = model.config.get_text_config(decoder=True)
        experts.has_gate, experts.has_bias, experts.has_post_expert_norm = True, False, False
        experts.is_transposed, experts.is_concatenated, experts._is_expert_parallel = True, True, False
        experts.scales_inputs = True
        experts._apply_gate = MethodType(_gate, experts)
        experts.forward = MethodType(_looked_up, experts)
        layer.forward = MethodType(_mixture, layer)
    return len(found)


def weighted(module: Any, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what experts multiply of x [R, K], and the weights [R, 1] that their outputs are left to be given."""
    return (x * weights, None) if getattr(module, "scales_inputs", False) else (x, weights)


def _scales_inputs(module: nn.Module) -> bool:
    if not dict(module.named_children()).keys() >= _PARTS or hasattr(module.experts, "scales_inputs"):
        return False
    return _SCALES in inspect.getsource(type(module).forward)


def _gate(self: Any, gate_up: Tensor) -> Tensor:  # [R, 2 I] -> [R, I]
    gate, up = gate_up.chunk(2, dim=-1)
    return up * self.act_fn(gate)  # type: ignore[no-any-return]


def _looked_up(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    compute: Any = ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation]
    return compute(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


def _mixture(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's own forward: [..., D] in; [T, D] and the router's logits [T, E] out."""
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden_states)  # [T, E] both; scores are 0 but for the chosen
    weights, chosen = torch.topk(scores, self.top_k, dim=-1)
    routed = self.experts(hidden_states, chosen, weights)
    return self.shared_expert(hidden_states) + routed, logits
