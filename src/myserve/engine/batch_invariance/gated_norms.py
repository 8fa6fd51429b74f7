"""The norms beside a gate that recurrent layers end with: recognised by trying them, and made one pass.

Their models write them alike but for four things, which are tried one after the other: what the gate goes through,
whether it comes before the norm, where the product with the weight is rounded, and in how many groups a row is normed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from myserve.engine.batch_invariance import pointwise
from myserve.engine.batch_invariance.activations import ExactFunctions

__all__ = ["GatedNormKind", "fuse_gated_norms", "gated_norm_kind"]

_ACTIVATIONS: dict[Literal["silu", "sigmoid"], Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, slots=True)
class GatedNormKind:
    """A family of gated RMS norms."""

    act: Literal["silu", "sigmoid"]
    gates_first: bool
    rounds_first: bool  # before the weight, and behind it
    groups: int
    eps: float

    def reference(self, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        """Return the norm of x [..., D] in tensor operations, as models spell it out; gate [..., D], weight [D]."""
        opened = _ACTIVATIONS[self.act](gate.float())
        hidden = x.float() * opened if self.gates_first else x.float()
        parts = hidden.view(*hidden.shape[:-1], self.groups, -1)
        normed = (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)
        scaled = weight * normed.to(x.dtype) if self.rounds_first else weight.float() * normed
        out: Tensor = scaled if self.gates_first else scaled * opened
        return out.to(x.dtype)

    def fused(self, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        """Return the same in one pass, its sums in our order."""
        return pointwise.gated_norm(
            x, gate, weight, self.eps, groups=self.groups, act=self.act, gates_first=self.gates_first,
            rounds_first=self.rounds_first,
        )  # fmt: skip


def gated_norm_kind(module: nn.Module) -> GatedNormKind | None:
    """Return which gated RMSNorm a module is; None for everything else.

    Its activation must be ours already (`install_activations`), or what is tried has other last bits.

    >>> gated_norm_kind(nn.LayerNorm(4)) is None
    True
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or set(module._parameters) != {"weight"}:
        return None
    if not isinstance(eps, float) or not pointwise.is_ours(weight):
        return None
    if list(inspect.signature(type(module).forward).parameters)[1:] != ["hidden_states", "gate"]:
        return None
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 1, 64, len(weight), generator=generator).to(weight.dtype)
    probe = torch.randn(len(weight), generator=generator).to(weight.dtype)
    with torch.no_grad():
        own = torch.func.functional_call(module, {"weight": probe}, (x, gate))
        kinds = _kinds(module, len(weight), eps)
        return next((kind for kind in kinds if torch.equal(own, _tried(kind, x, gate, probe))), None)


def _tried(kind: GatedNormKind, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    with ExactFunctions(pointwise.activation):
        return kind.reference(x, gate, weight)


def _kinds(module: Any, width: int, eps: float) -> Iterator[GatedNormKind]:
    groups = getattr(module, "n_groups", None) or width // (getattr(module, "group_size", None) or width)
    for act, gates_first, rounds_first in product(_ACTIVATIONS, (False, True), (True, False)):
        yield GatedNormKind(act, gates_first, rounds_first, int(groups), eps)


def fuse_gated_norms(model: nn.Module) -> int:
    """Replace the forward of every gated RMSNorm; return how many there were."""
    modules: list[Any] = list(model.modules())
    found = [(module, kind) for module in modules if (kind := gated_norm_kind(module)) is not None]
    for module, kind in found:
        module.forward = MethodType(_forward(module.forward, kind), module)
    return len(found)


def _forward(theirs: Callable[..., Tensor], kind: GatedNormKind) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return theirs(hidden_states)
        return kind.fused(hidden_states, gate, self.weight)

    return forward
