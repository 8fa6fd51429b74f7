"""Makes a model batch-invariant: a token's numbers are a function of its own sequence, bit for bit.

What mixes rows in a transformer is the libraries' matrix products, which sum in an order that the number of rows
decides. Here every one of them becomes a `PackedWeight`: linear layers, routers, the experts of a mixture. Attention
is `mixers.attention`'s; activations are our kernels (`activations`); norms, gates and RoPE are made one pass each
(`fusion`). What is left works on one row at a time already; `runner.self_test` runs the loaded model batched and alone,
so that this need not be believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from myserve.engine.batch_invariance.activations import install_activations
from myserve.engine.batch_invariance.fusion import (
    SharedInput,
    fuse_gates,
    fuse_norms,
    fuse_rotary,
    products_of_one_input,
)
from myserve.engine.batch_invariance.linear import JoinedWeights, PackedWeight, multiply_each
from myserve.engine.kernels.tiles import bfloat16_unit
from myserve.engine.memory import huge_pages
from myserve.engine.memory.prefault import Reserve

__all__ = [
    "EXPERTS_NAME",
    "ExactLinear",
    "ExactReport",
    "ExactWeight",
    "exact_experts_forward",
    "has_experts",
    "is_router",
    "make_exact",
    "packed_experts",
]

EXPERTS_NAME = "myserve_exact"  # what a model's `_experts_implementation` says


@dataclass(frozen=True, slots=True)
class ExactReport:
    """Reports how a model was made batch-invariant, for the log and for `/version`.

    >>> ExactReport(mode="off", unit="library", linears=0, routers=0, experts=0, norms=0).as_dict()["mode"]
    'off'
    """

    mode: Literal["on", "off"]
    unit: str  # what multiplies: "tiles" (AMX), "pairs" (AVX-512 BF16), "lanes" (float32), "library" (PyTorch's own)
    linears: int
    routers: int
    experts: int  # modules that hold the experts of a layer
    norms: int
    attention: str = "kernels"  # what attends: our kernels, PyTorch's "flash", or "gathered" and why
    fixed_rows: int = 0  # how many rows every forward pass has (`fixed_rows`); 0: as many as there are

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)


class ExactLinear(nn.Module):
    """A linear layer by our own kernel. It holds the weight in the kernel's order alone; new values: `replace`."""

    def __init__(self, packed: PackedWeight, *, is_transposed: bool = False) -> None:
        """`is_transposed`: the layer that it comes from has its weight [K, N]."""
        super().__init__()
        self.is_transposed = is_transposed
        self.packed = packed
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self._shared: tuple[SharedInput, int] | None = None

    @property
    def weight(self) -> Tensor:
        """A tensor without values: some models look at the weight's dtype or shape (Hunyuan's router)."""
        return torch.empty(self.out_features, self.in_features, dtype=self.packed.dtype, device="meta")

    def share(self, shared: SharedInput, part: int) -> None:
        """Make this layer a part of a joined product."""
        self._shared = shared, part

    def replace(self, packed: PackedWeight) -> None:
        """Take new values; a part of a joined product keeps its place."""
        if self._shared is None:
            self.packed = packed
        else:
            self.packed.copy_(packed)

    def forward(self, x: Tensor) -> Tensor:
        if self._shared is None:
            return self.packed(x)
        shared, part = self._shared
        return shared.product(part, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.packed.dtype}"


class ExactWeight(Tensor):
    """A router's weight: transformers' routers give it to `F.linear` themselves, so it is the weight that knows."""

    packed: PackedWeight

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, reserve: Reserve | None = None) -> ExactWeight:
        exact = weight.detach().as_subclass(cls)
        exact.packed = PackedWeight(weight, bias, reserve=reserve)
        return exact

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and isinstance(args[1], cls):
            return args[1].packed(args[0])  # the bias, where there is one, is packed with it
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def make_exact(
    model: nn.Module, *, mode: Literal["on", "off"] = "on", reserve: Reserve | None = None
) -> ExactReport:
    """Replace, in place, all of a CPU model's matrix products; `mode="off"` leaves the library's.

    A layer's own weight is freed as soon as it is packed, its pages of the checkpoint's file too, so that a model needs
    little more than its weights while it is prepared; embeddings tied to the output layer stay beside its packed copy.
    `reserve`: memory for the packed weights that is filled already.
    """
    if mode == "off":
        return ExactReport(mode="off", unit="library", linears=0, routers=0, experts=0, norms=0)
    experts = sum(_pack_experts(module, reserve) for module in list(model.modules()) if has_experts(module))
    routers = sum(_pack_router(module, reserve) for module in list(model.modules()) if is_router(module))
    files = huge_pages.FilePages()
    linears = _join_products(model, files, reserve)
    for parent, name, module in list(_linears(model)):
        transposed = isinstance(module, Conv1D)
        weight = module.weight.T if transposed else module.weight
        packed = PackedWeight(weight, module.bias, reserve=reserve)
        setattr(parent, name, ExactLinear(packed, is_transposed=transposed))
        files.let_go(module.weight)
        linears += 1
    install_activations(model)
    fuse_gates(model)
    fuse_rotary(model)
    norms = fuse_norms(model)
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    unit = bfloat16_unit() if half else "lanes"
    return ExactReport(mode="on", unit=unit, linears=linears, routers=routers, experts=experts, norms=norms)


def _join_products(model: nn.Module, files: huge_pages.FilePages, reserve: Reserve | None) -> int:
    """Join products that multiply one x; return how many layers that were."""
    found = list(products_of_one_input(model))
    for parent, names in found:
        layers: list[Any] = [getattr(parent, name) for name in names]
        joined = JoinedWeights([(layer.weight, layer.bias) for layer in layers], reserve)
        shared = SharedInput(joined)
        for part, (name, packed) in enumerate(zip(names, joined.parts, strict=True)):
            exact = ExactLinear(packed)
            exact.share(shared, part)
            setattr(parent, name, exact)
            files.let_go(layers[part].weight)
    return sum(len(names) for _, names in found)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in model.modules():
        for name, module in parent.named_children():
            if is_linear(module):
                yield parent, name, module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more: Phi-3.5-MoE's router is one that also chooses experts."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def is_router(module: nn.Module) -> bool:
    """Return whether a module holds a matrix and is none of the kinds that are known to: a router."""
    weight = module._parameters.get("weight")
    known = is_linear(module) or isinstance(module, nn.Embedding)
    return weight is not None and weight.dim() == 2 and not known


def _pack_router(module: nn.Module, reserve: Reserve | None) -> int:
    weight, bias = module._parameters.pop("weight"), module._parameters.get("bias")
    assert weight is not None
    module.weight = ExactWeight.of(weight, bias, reserve)
    return 1


def has_experts(module: nn.Module) -> bool:
    """Return whether a module is transformers' experts: weights [E, N, K], and a forward that is looked up by name."""
    return hasattr(module, "_is_expert_parallel") and "down_proj" in module._parameters


def _pack_experts(module: Any, reserve: Reserve | None) -> int:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    module.packed_up, module.packed_down = (_pack_each(module, name, reserve) for name in (up, "down_proj"))
    module.config._experts_implementation = EXPERTS_NAME
    return 1


def _pack_each(module: Any, name: str, reserve: Reserve | None) -> list[PackedWeight]:
    weights, biases = module._parameters.pop(name), module._parameters.get(f"{name}_bias")
    return packed_experts(weights, biases, is_transposed=module.is_transposed, reserve=reserve)


# weights [E, N, K] or [E, K, N], biases [E, N]
def packed_experts(
    weights: Tensor, biases: Tensor | None, *, is_transposed: bool, reserve: Reserve | None = None
) -> list[PackedWeight]:
    weights = weights.transpose(1, 2) if is_transposed else weights
    return [
        PackedWeight(w, None if biases is None else biases[e], reserve=reserve) for e, w in enumerate(weights)
    ]


def exact_experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute a mixture: an expert takes its tokens at once; a token's experts are summed best first, in float32.

    hidden_states [T, D], top_k_index and top_k_weights [T, k]; gives [T, D].
    """
    tokens, k = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)  # [T * k]: places (token, slot), expert by expert
    counts = top_k_index.flatten().bincount(minlength=len(module.packed_up)).tolist()
    inner = multiply_each(module.packed_up, hidden_states[order // k], counts)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = multiply_each(module.packed_down, inner, counts)  # [T * k, D]
    if module.has_post_expert_norm:
        outer = module.post_expert_norm(outer)
    weighted = (outer * top_k_weights.flatten()[order, None]).float()
    parts = torch.empty_like(weighted).index_copy_(0, order, weighted).view(tokens, k, -1)
    total = parts[:, 0]
    for j in range(1, k):
        total = total + parts[:, j]
    return total.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, exact_experts_forward)
