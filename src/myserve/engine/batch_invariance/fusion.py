"""Norms, RoPE, gates and products of one input are fused: fewer passes over memory, and the bits stay.

What is replaced is recognised by what it computes, never by a model's name: a norm by trying it, the gate by its one
line of source, the rotary function by comparing bits. What is not recognised stays as transformers wrote it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from myserve.engine.batch_invariance import pointwise
from myserve.engine.batch_invariance.activations import activation_of
from myserve.engine.batch_invariance.linear import JoinedWeights

__all__ = [
    "NormKind",
    "SharedInput",
    "fuse_gates",
    "fuse_norms",
    "fuse_rotary",
    "gate_activation",
    "norm_kind",
    "products_of_one_input",
]

# In the order in which a module calls them
_SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)
_GATE_SOURCE = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True, slots=True)
class NormKind:
    """A family of RMS norms: what is added to the weight, and whether the product rounds once or twice."""

    offset: float
    rounds_first: bool

    def reference(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the norm of x [..., D] in tensor operations, as models spell it out; weight [D]."""
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        if self.rounds_first:
            return weight * normed.to(x.dtype)
        return (normed * (weight.float() + self.offset)).to(x.dtype)


_KINDS = (NormKind(0.0, True), NormKind(0.0, False), NormKind(1.0, False))  # Llama; OLMo 2 and gpt-oss; Gemma


def norm_kind(module: nn.Module) -> tuple[NormKind, float] | None:
    """Return which RMSNorm a module is, and its epsilon; None for everything else.

    >>> norm_kind(nn.LayerNorm(4)) is None
    True
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or set(module._parameters) != {"weight"}:
        return None
    if not isinstance(eps, float) or not pointwise.is_ours(weight):
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:  # one that also multiplies by a gate
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, len(weight), generator=generator).to(weight.dtype)
    probe = torch.randn(len(weight), generator=generator).to(weight.dtype)
    with torch.no_grad():
        own = torch.func.functional_call(module, {"weight": probe}, (x,))
        for kind in _KINDS:
            if torch.equal(own, kind.reference(x, probe, eps)):
                return kind, eps
    return None


def gate_activation(module: nn.Module) -> str | None:
    """Return the name of `act` where a module computes down(act(gate(x)) * up(x)) and nothing else (SwiGLU, GeGLU).

    >>> gate_activation(nn.SiLU()) is None
    True
    """
    name = activation_of(getattr(module, "act_fn", None))
    if name is None:
        return None
    lines = [line.strip() for line in inspect.getsource(type(module).forward).splitlines()[1:]]
    body = " ".join(line for line in lines if line)
    is_gate = body in (f"return {_GATE_SOURCE}", f"down_proj = {_GATE_SOURCE} return down_proj")
    return name if is_gate else None


def fuse_norms(model: nn.Module) -> int:
    """Replace the forward of every RMSNorm; return how many there were."""
    modules: list[Any] = list(model.modules())
    found = [(module, known) for module in modules if (known := norm_kind(module)) is not None]
    for module, known in found:
        module.forward = MethodType(_norm_forward(*known), module)
    return len(found)


def _norm_forward(kind: NormKind, eps: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return pointwise.rms_norm(x, self.weight, eps, offset=kind.offset, rounds_first=kind.rounds_first)

    return forward


def fuse_gates(model: nn.Module) -> None:
    """Replace the forward of every gated MLP: the activation and the product with `up` in one pass."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if (name := gate_activation(module)) is not None:
            module.forward = MethodType(_gate_forward(name), module)


def _gate_forward(name: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(pointwise.activation(name, self.gate_proj(x), self.up_proj(x)))
        return out

    return forward


class SharedInput:
    """Products of one x, computed together when the first is asked for and kept for the others."""

    def __init__(self, joined: JoinedWeights) -> None:
        self._joined, self._parts = joined, joined.parts
        self._x: Tensor | None = None
        self._made: list[Tensor] = []

    def product(self, part: int, x: Tensor) -> Tensor:
        """Return one part's product [..., N] of x [..., K]; another x than the first part's is multiplied alone."""
        if part == 0:
            self._x, self._made = x, self._joined(x)
        elif self._x is not x:
            return self._parts[part](x)
        made = self._made[part]
        if part == len(self._parts) - 1:
            self._x, self._made = None, []
        return made


def products_of_one_input(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Yield the linear layers of a module that multiply one x, by their names in it."""
    for module in model.modules():
        for names in _SHARED_INPUTS:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                yield module, list(names)


def fuse_rotary(model: nn.Module) -> None:
    """Put our kernel before the RoPE function of the files that the model's classes come from.

    The function is a global of a file of transformers, so a trainer's model in this process finds ours too: where
    there are gradients to keep, or another shape, it goes on to the old one, and the bits are the same.
    """
    for name in {type(module).__module__ for module in model.modules()}:
        file = sys.modules[name]
        theirs = getattr(file, _ROTARY, None)
        if theirs is not None and not hasattr(theirs, "before_fusion") and _rotates_halves(theirs):
            setattr(file, _ROTARY, _rotary_before(theirs, takes_parts=_rotates_halves(theirs, beyond=4)))


def _rotary_before(theirs: Callable[..., Any], *, takes_parts: bool) -> Callable[..., Any]:
    """`takes_parts`: where angles are fewer than a head has numbers, the rest of the head stays."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        known = unsqueeze_dim == 1 and q.dim() == 4 and q.shape[0] == 1 and cos.dim() == 3
        (dim, angles), same = (q.shape[-1], cos.shape[-1]), q.shape[-1] == k.shape[-1]
        fits = same and sin.shape == cos.shape and cos.shape[0] == 1
        fits = fits and (angles == dim or (takes_parts and angles < dim))
        if not (known and fits and torch.is_inference_mode_enabled() and pointwise.is_ours(q, k, cos, sin)):
            rotated: tuple[Tensor, Tensor] = theirs(q, k, cos, sin, unsqueeze_dim)
            return rotated
        query, key = pointwise.rotate(q[0], k[0], cos[0], sin[0])
        return query[None], key[None]

    apply_rotary_pos_emb.before_fusion = theirs  # type: ignore[attr-defined]  # so that it is put there once
    return apply_rotary_pos_emb


def _rotates_halves(function: Callable[..., Any], *, beyond: int = 0) -> bool:
    """Return whether a function has the usual signature and, on random numbers, the bits of `pointwise.rotate`.

    `beyond`: how many numbers a head has more than angles.
    """
    generator = torch.Generator().manual_seed(0)
    widths = (4, 8 + beyond), (2, 8 + beyond), (1, 8), (1, 8)
    q, k, cos, sin = (torch.randn(1, n, 3, width, generator=generator).bfloat16() for n, width in widths)
    try:
        theirs = function(q, k, cos[:, 0], sin[:, 0])
    except (TypeError, RuntimeError, IndexError):
        return False
    ours = pointwise.rotate(q[0], k[0], cos[0, 0], sin[0, 0])
    return all(torch.equal(a[0], b) for a, b in zip(theirs, ours, strict=True))
