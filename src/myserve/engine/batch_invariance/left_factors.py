"""Weights that a layer multiplies from the left itself, `weight @ x`: Mamba-1's way from a token to its step in time.

Its layers hold the bias back, since their scan adds it, and so take the weight of a linear layer, not the layer. Zamba
has a weight for each head, and no layer. Here the weight of either is a tensor without values that knows its product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.memory.prefault import Reserve

__all__ = [
    "HEADS",
    "MATMULS",
    "HeadFactors",
    "LeftFactor",
    "has_heads",
    "multiplies_from_the_left",
    "pack_left_factors",
    "times_columns",
]

MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
HEADS = ("x_proj_weight", "dt_proj_weight")  # parameters [H, N, K] of a layer


def multiplies_from_the_left(module: nn.Module) -> bool:
    """Return whether a module's own code multiplies by weights from the left.

    >>> multiplies_from_the_left(nn.Linear(1, 1))
    False
    """
    return hasattr(module, "dt_proj") or has_heads(module)


def has_heads(module: nn.Module) -> bool:
    """Return whether a module holds weights of heads, [H, N, K], that it multiplies by: Zamba's layers."""
    return HEADS[0] in module._parameters


def pack_left_factors(module: Any, let_go: Callable[[Tensor], None], reserve: Reserve | None) -> int:
    """Pack the weights of heads of a layer, if it has some; return 1 where it does. They are never int8, as routers.

    `let_go`: gives the memory of what was packed back.
    """
    if hasattr(module, "dt_proj"):
        module.dt_proj.takes_adapters = False  # the weight alone is taken, past what changes the linear layer
    if not has_heads(module):
        return 0
    for name in HEADS:
        weights = module._parameters.pop(name)
        setattr(module, name, HeadFactors.of([PackedWeight(weight, reserve=reserve) for weight in weights]))
        let_go(weights)
    return 1


def times_columns(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return weight @ x [..., N, T] by a product of rows: x [..., K, T], `product` gives [..., N] of [..., K].

    >>> times_columns(lambda rows: rows @ torch.ones(2, 3), torch.ones(1, 2, 4)).shape
    torch.Size([1, 3, 4])
    """
    return product(x.transpose(-1, -2)).transpose(-1, -2)


class LeftFactor(Tensor):
    """Stands for the weight [N, K] of a linear layer: it has a shape and a type, and its product with x [B, K, T]."""

    packed: PackedWeight  # without a bias

    @classmethod
    def of(cls, packed: PackedWeight) -> LeftFactor:
        """
        >>> LeftFactor.of(PackedWeight(2 * torch.eye(2), torch.ones(2))) @ torch.ones(1, 2, 1)
        tensor([[[2.],
                 [2.]]])
        """
        shape = torch.empty(packed.out_features, packed.in_features, dtype=packed.dtype, device="meta")
        factor = shape.as_subclass(cls)
        factor.packed = packed.with_bias(torch.zeros(packed.out_features))
        return factor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in MATMULS and isinstance(args[0], cls):
            return times_columns(args[0].packed, args[1])
        with torch._C.DisableTorchFunctionSubclass():  # what is computed of it otherwise has no product
            return func(*args, **(kwargs or {}))


class HeadFactors(Tensor):
    """Stands for the weights [H, N, K] of all heads: `weights[:, None] @ x` for x [H, B, K, T]."""

    packed: list[PackedWeight]

    @classmethod
    def of(cls, packed: list[PackedWeight]) -> HeadFactors:
        first = packed[0]
        shape = (len(packed), first.out_features, first.in_features)
        factors = torch.empty(shape, dtype=first.dtype, device="meta").as_subclass(cls)
        factors.packed = packed
        return factors

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and args[1] == (slice(None), None):
            return args[0]
        if func in MATMULS and isinstance(args[0], cls):
            heads = zip(args[0].packed, args[1], strict=True)
            return torch.stack([times_columns(packed, x) for packed, x in heads])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
