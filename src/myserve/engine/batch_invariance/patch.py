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
from myserve.engine.batch_invariance.gated_norms import fuse_gated_norms
from myserve.engine.batch_invariance.grouped_linear import GroupedLinear, is_grouped_linear
from myserve.engine.batch_invariance.left_factors import LeftFactor, has_heads, pack_left_factors
from myserve.engine.batch_invariance.linear import JoinedWeights, PackedWeight, multiply_each
from myserve.engine.batch_invariance.low_rank import LowRankLayer
from myserve.engine.batch_invariance.own_matrices import is_linear, own_matrices, pack_own_matrices
from myserve.engine.batch_invariance.quantized import (
    Int8Values,
    QuantizedWeight,
    can_quantize,
    stored,
    values_of,
)
from myserve.engine.batch_invariance.scaled_experts import adopt_scaled_experts, weighted
from myserve.engine.kernels.int8.dots import int8_unit
from myserve.engine.kernels.tiles import product_unit
from myserve.engine.memory import huge_pages
from myserve.engine.memory.prefault import Reserve

__all__ = [
    "EXPERTS_NAME",
    "ExactLinear",
    "ExactReport",
    "QuantizationReport",
    "exact_experts_forward",
    "has_experts",
    "make_exact",
    "packed_experts",
    "products",
]

_LISTS_OF_PRODUCTS = ("packed_up", "packed_down", "packed_each")
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


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Reports which layers compute in int8, for the log and for `/version`.

    >>> QuantizationReport().as_dict()
    {'method': 'off'}
    """

    method: Literal["off", "int8"] = "off"
    unit: str = ""  # what multiplies bytes: "tiles" (AMX), "dots" (AVX-512 VNNI), "lanes" (16-bit lanes)
    layers: int = 0  # linear layers, the output layer among them; modules of experts count once
    unquantized: tuple[str, ...] = ()  # names of the layers that stayed in the model's dtype

    def as_dict(self) -> dict[str, Any]:
        return {"method": "off"} if self.method == "off" else asdict(self)


class ExactLinear(nn.Module):
    """A linear layer by our own kernel. It holds the weight in the kernel's order alone; new values: `replace`."""

    def __init__(self, packed: PackedWeight, *, is_transposed: bool = False) -> None:
        """`is_transposed`: the layer that it comes from has its weight [K, N]."""
        super().__init__()
        self.is_transposed = is_transposed
        self.packed = packed
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self._shared: tuple[SharedInput, int] | None = None
        self.low_rank: LowRankLayer | None = None  # None: no adapter has ever changed it
        self.takes_adapters = True
        self._factor: LeftFactor | None = None

    @property
    def weight(self) -> Tensor:
        """A tensor without values: models look at its dtype (Hunyuan's router), or multiply by it (Mamba's layers)."""
        if self._factor is None:
            self._factor = LeftFactor.of(self.packed)
        return self._factor

    @property
    def bias(self) -> Tensor:
        """The bias [N] in float32; zeros where the layer has none."""
        return self.packed.bias[: self.out_features]

    def share(self, shared: SharedInput, part: int) -> None:
        """Make this layer a part of a joined product."""
        self._shared = shared, part

    def replace(self, packed: PackedWeight) -> None:
        """Take new values; a part of a joined product keeps its place."""
        if self._shared is None:
            self.packed = packed
            self._factor = None if self._factor is None else LeftFactor.of(packed)
        else:
            self.packed.copy_(packed)

    def forward(self, x: Tensor) -> Tensor:
        if self._shared is None:
            y = self.packed(x)
        else:
            shared, part = self._shared
            y = shared.product(part, x)
        return y if self.low_rank is None else self.low_rank.add(x, y)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.packed.dtype}"


def make_exact(
    model: nn.Module,
    *,
    mode: Literal["on", "off"] = "on",
    reserve: Reserve | None = None,
    quantize: Literal["off", "int8"] = "off",
) -> tuple[ExactReport, QuantizationReport]:
    """Replace, in place, all of a CPU model's matrix products; `mode="off"` leaves the library's.

    A layer's own weight is freed as soon as it is packed, its pages of the checkpoint's file too, so that a model needs
    little more than its weights while it is prepared; embeddings tied to the output layer stay beside its packed copy.
    `reserve`: memory for the packed weights that is filled already. `quantize`: "int8" makes linear layers, experts and
    the output layer products of int8; routers stay as they are, for what they choose is no matter of a little noise.
    """
    if mode == "off":
        off = ExactReport(mode="off", unit="library", linears=0, routers=0, experts=0, norms=0)
        return off, QuantizationReport()
    adopt_scaled_experts(model)
    files = huge_pages.FilePages()
    packing = _Packing(quantize == "int8", reserve, files)
    names = {id(module): name for name, module in model.named_modules()}
    unquantized = [
        names[id(module)] for module in model.modules() if own_matrices(module) or has_heads(module)
    ]
    experts = sum(_pack_experts(module, packing) for module in list(model.modules()) if has_experts(module))
    experts += _pack_grouped_linears(model, packing)
    routers = sum(pack_own_matrices(module, reserve) for module in list(model.modules()))
    linears = _join_products(model, packing)
    for parent, name, module in list(_linears(model)):
        transposed = isinstance(module, Conv1D)
        packed = packing.pack(module.weight, module.bias, is_transposed=transposed)
        setattr(parent, name, ExactLinear(packed, is_transposed=transposed))
        linears += 1
    routers += sum(pack_left_factors(module, packing.let_go, reserve) for module in model.modules())
    install_activations(model)
    fuse_gates(model)
    fuse_rotary(model)
    norms = fuse_norms(model) + fuse_gated_norms(model)
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    unit = product_unit() if half else "lanes"
    report = ExactReport(mode="on", unit=unit, linears=linears, routers=routers, experts=experts, norms=norms)
    if not any(isinstance(p, QuantizedWeight) for p in products(model)):
        return report, QuantizationReport()
    unquantized += [name for name, module in model.named_modules() if _holds_floats(module)]
    layers = linears + routers + experts - len(unquantized)
    return report, QuantizationReport("int8", int8_unit(), layers, tuple(sorted(unquantized)))


@dataclass(frozen=True, slots=True)
class _Packing:
    """The way from weights [N, K] to products: in int8 or not, into which memory."""

    quantizes: bool
    reserve: Reserve | None
    files: huge_pages.FilePages

    def kind_of(self, weight: Tensor, *, is_transposed: bool = False) -> type[PackedWeight]:
        inner = weight.shape[-2 if is_transposed else -1]
        quantizes = stored(weight) or (self.quantizes and can_quantize(inner))
        return QuantizedWeight if quantizes else PackedWeight

    def pack(self, weight: Tensor, bias: Tensor | None, *, is_transposed: bool = False) -> PackedWeight:
        """Return one product, and give the pages of the weight's file back."""
        kind = self.kind_of(weight, is_transposed=is_transposed)
        value = values_of(weight, is_transposed=is_transposed)
        packed = kind(value, bias, reserve=self.reserve)
        self.let_go(value)
        return packed

    def let_go(self, value: Tensor | Int8Values) -> None:
        """Give the pages of a packed weight's file back."""
        self.files.let_go(value.values if isinstance(value, Int8Values) else value)


def products(model: nn.Module) -> Iterator[PackedWeight]:
    """Yield all products of a model's linear layers and experts."""
    for module in model.modules():
        yield from _products_of(module)


def _products_of(module: Any) -> list[PackedWeight]:
    if isinstance(module, ExactLinear):
        return [module.packed]
    return [product for name in _LISTS_OF_PRODUCTS for product in getattr(module, name, ())]


def _holds_floats(module: Any) -> bool:
    """Return whether one of a module's own products is not int8."""
    return not all(isinstance(packed, QuantizedWeight) for packed in _products_of(module))


def _join_products(model: nn.Module, packing: _Packing) -> int:
    """Join products that multiply one x; return how many layers that were."""
    count = 0
    for parent, names in list(products_of_one_input(model)):
        layers: list[Any] = [getattr(parent, name) for name in names]
        kinds = {packing.kind_of(layer.weight) for layer in layers}
        if len(kinds) > 1:  # a checkpoint that has some of them in int8
            continue
        values = [values_of(layer.weight) for layer in layers]
        biases = [layer.bias for layer in layers]
        joined = JoinedWeights(list(zip(values, biases, strict=True)), packing.reserve, kinds.pop())
        shared = SharedInput(joined)
        for part, (name, packed) in enumerate(zip(names, joined.parts, strict=True)):
            exact = ExactLinear(packed)
            exact.share(shared, part)
            setattr(parent, name, exact)
            packing.let_go(values[part])
        count += len(names)
    return count


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in model.modules():
        for name, module in parent.named_children():
            if is_linear(module):
                yield parent, name, module


def _pack_grouped_linears(model: nn.Module, packing: _Packing) -> int:
    found = [(p, n, m) for p in model.modules() for n, m in p.named_children() if is_grouped_linear(m)]
    for parent, name, module in found:
        setattr(parent, name, GroupedLinear(_pack_each(module, "weight", packing)))
    return len(found)


def has_experts(module: nn.Module) -> bool:
    """Return whether a module is transformers' experts: weights [E, N, K], and a forward that is looked up by name."""
    return hasattr(module, "_is_expert_parallel") and "down_proj" in module._parameters


def _pack_experts(module: Any, packing: _Packing) -> int:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    module.packed_up, module.packed_down = (_pack_each(module, name, packing) for name in (up, "down_proj"))
    module.low_rank_up = module.low_rank_down = None
    module.config._experts_implementation = EXPERTS_NAME
    return 1


def _pack_each(module: Any, name: str, packing: _Packing) -> list[PackedWeight]:
    weights, biases = module._parameters.pop(name), module._parameters.get(f"{name}_bias")
    is_transposed: bool = getattr(module, "is_transposed", False)
    kind = packing.kind_of(weights, is_transposed=is_transposed)
    values = values_of(weights, is_transposed=is_transposed)
    packed = packed_experts(values, biases, kind, packing.reserve)
    packing.let_go(values)
    return packed


def packed_experts(
    weights: Any,
    biases: Tensor | None,
    kind: type[PackedWeight],
    reserve: Reserve | None = None,
) -> list[PackedWeight]:
    """Return each expert's product, of weights [E, N, K] as `kind` takes them, and biases [E, N]."""
    return [
        kind(weights[e], None if biases is None else biases[e], reserve=reserve) for e in range(len(weights))
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
    token, expert = order // k, top_k_index.flatten()[order]
    x, weights = weighted(module, hidden_states[token], top_k_weights.flatten()[order, None])
    inner = _with_adapters(module.low_rank_up, token, expert, x, multiply_each(module.packed_up, x, counts))
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = multiply_each(module.packed_down, inner, counts)  # [T * k, D]
    outer = _with_adapters(module.low_rank_down, token, expert, inner, outer)
    if module.has_post_expert_norm:
        outer = module.post_expert_norm(outer)
    given = (outer if weights is None else outer * weights).float()
    parts = torch.empty_like(given).index_copy_(0, order, given).view(tokens, k, -1)
    total = parts[:, 0]
    for j in range(1, k):
        total = total + parts[:, j]
    return total.to(hidden_states.dtype)


def _with_adapters(layer: LowRankLayer | None, token: Tensor, expert: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return y [R, N] of x [R, K] with the adapters of the rows' tokens and experts [R]."""
    rows = None if layer is None else layer.rows_of(token, expert)
    return y if layer is None or rows is None else layer.add(x, y, rows)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, exact_experts_forward)
