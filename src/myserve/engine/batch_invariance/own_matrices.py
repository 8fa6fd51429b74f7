"""Matrices that a module holds as parameters of its own and multiplies by itself: routers', and hyper-connections'.

No module stands where their product is made, so it is the weight that knows how: given to `F.linear`, it multiplies by
our own kernel, in one order of summation for any number of rows.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.memory.prefault import Reserve

__all__ = ["ExactWeight", "exact_weights", "is_linear", "is_router", "own_matrices", "pack_own_matrices"]

_CASTS = {Tensor.float, Tensor.type, Tensor.to}
# a module's own parameter that its forward multiplies by: HY-V4's hyper-connections have `fn`
_OWN_PRODUCT = re.compile(r"\blinear\([^\n]*?, self\.(\w+)")


class ExactWeight(Tensor):
    """A weight that its module gives to `F.linear` itself, as transformers' routers do: so it is the weight that knows.

    Many cast it to float32 first (DeepSeek-V3 and its kin): in half precision a second product is packed for that.
    """

    packed: PackedWeight
    bias: Tensor | None
    wide: ExactWeight | None  # in float32, once that was asked for

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, reserve: Reserve | None = None) -> ExactWeight:
        exact = weight.detach().as_subclass(cls)
        exact.packed = PackedWeight(weight, bias, reserve=reserve)
        exact.bias, exact.wide = bias, None
        return exact

    def widened(self) -> ExactWeight:
        """Return the same weight in float32, made once."""
        if self.wide is None:
            self.wide = ExactWeight.of(self.as_subclass(Tensor).to(torch.float32), self.bias)
        return self.wide

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and isinstance(args[1], cls):
            return args[1].packed(args[0])  # the bias, where there is one, is packed with it
        if func in _CASTS and args[0].dtype != torch.float32:
            given = (*args[1:], *(kwargs or {}).values())
            if func is Tensor.float or torch.float32 in [
                each for each in given if isinstance(each, torch.dtype)
            ]:
                return args[0].widened()
        with torch._C.DisableTorchFunctionSubclass():  # what is computed of such a weight is a plain tensor
            return func(*args, **(kwargs or {}))


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer and no more: Phi-3.5-MoE's router is one that also chooses experts."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def is_router(module: nn.Module) -> bool:
    """Return whether a module holds a matrix and is none of the kinds that are known to: a router."""
    weight = module._parameters.get("weight")
    known = is_linear(module) or isinstance(module, nn.Embedding)
    return weight is not None and weight.dim() == 2 and not known


def own_matrices(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that its forward gives to `F.linear`; a router's is `weight`.

    >>> own_matrices(nn.Linear(1, 1))
    []
    """
    if is_router(module):
        return ["weight"]
    found = [name for name, own in module._parameters.items() if own is not None and own.dim() == 2]
    if not found or is_linear(module) or isinstance(module, nn.Embedding | nn.MultiheadAttention):
        return []
    return [name for name in _OWN_PRODUCT.findall(inspect.getsource(type(module).forward)) if name in found]


def exact_weights(module: nn.Module) -> dict[str, ExactWeight]:
    """Return what a module holds in place of its own matrices, by name."""
    return {name: value for name, value in vars(module).items() if isinstance(value, ExactWeight)}


def pack_own_matrices(module: nn.Module, reserve: Reserve | None) -> int:
    """Put an `ExactWeight` in the place of each of a module's own matrices; return 1 where it has some."""
    names = own_matrices(module)
    for name in names:
        weight, bias = module._parameters.pop(name), None
        if name == "weight":
            bias = module._parameters.get("bias")
        assert weight is not None
        setattr(module, name, ExactWeight.of(weight, bias, reserve))
    return bool(names)
