"""PEFT's LoRA layers compute as the server does with their adapter: its products, its roundings, with gradients.

PEFT is not imported: a LoRA layer is known by what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["Product", "add_expert_adapters", "is_lora_layer", "make_lora_exact"]

Product = Callable[[Tensor, Tensor], Tensor]  # x [..., K], weight [N, K] -> [..., N]


def is_lora_layer(module: nn.Module) -> bool:
    """Return whether a module is a LoRA layer of PEFT around another."""
    has = all(hasattr(module, name) for name in ("base_layer", "scaling", "lora_dropout"))
    return has and isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def make_lora_exact(layer: Any, product: Product) -> None:
    """Replace the forward of a LoRA layer; the layer inside of it is exact already, or will be.

    Raises ValueError for what the server does not serve: DoRA and other variants, biases, embeddings.
    """
    _refuse_variants(layer)
    if hasattr(layer, "parameter_name"):  # PEFT's ParamWrapper: all experts of a layer
        experts = _innermost(layer)
        experts.__dict__.setdefault("exact_adapters", {})[layer.parameter_name] = layer
        layer.forward = MethodType(lambda self, *args, **kwargs: self.base_layer(*args, **kwargs), layer)
    else:
        layer.forward = MethodType(_forward_with(product), layer)


def _refuse_variants(layer: Any) -> None:
    if getattr(layer, "lora_variant", None) or any(getattr(layer, "use_dora", {}).values()):
        raise ValueError("exact_forward computes plain LoRA; DoRA and other variants have other products")
    if any(getattr(layer, "lora_bias", {}).values()) or len(getattr(layer, "lora_embedding_A", ())):
        raise ValueError("exact_forward computes LoRA of linear layers without biases of their own")


def _innermost(layer: Any) -> Any:
    while is_lora_layer(layer):
        layer = layer.base_layer
    return layer


def _active(layer: Any) -> Iterator[str]:
    """Yield the names of the adapters that change the layer's output now."""
    if not (layer.disable_adapters or layer.merged):
        yield from (name for name in layer.active_adapters if name in layer.lora_A)


def _forward_with(product: Product) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names cannot be had with exact_forward: run each adapter's rows alone")
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in _active(self):
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            y = _add(y, self.lora_dropout[name](x), a, b, self.scaling[name], product)
        return y

    return forward


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, product: Product) -> Tensor:
    """Return y + scale * B(A(x)) with the server's roundings (decision 0065); A [r, K], B [N, r] of any float dtype."""
    made = product(product(x, a.to(x.dtype)), b.to(x.dtype))
    return y + (made.float() * scale).to(y.dtype)


def add_expert_adapters(
    experts: Any, parameter: str, expert: int, x: Tensor, y: Tensor, product: Product
) -> Tensor:
    """Return y [T, N] of one expert's rows x [T, K] with what the adapters of that parameter add."""
    layer = experts.__dict__.get("exact_adapters", {}).get(parameter)
    for name in () if layer is None else _active(layer):
        a, b, count = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.num_experts
        own_a = a.reshape(count, -1, a.shape[1])[expert]  # [r, K]
        own_b = b.reshape(len(b), -1, count)[..., expert]  # [N, r]
        y = _add(y, x, own_a, own_b, layer.scaling[name], product)
    return y
