"""The holders of a serving model's weights, and how they get new values: made beside the old, then put in place.

What a model holds beside its parameters is derived from them: packed products, routers, experts. Code that derives
something new from a weight must be listed here; `tests/engine/weights/test_prepare.py` compares an updated model of
every kind with a fresh one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from myserve.engine.batch_invariance.grouped_linear import GroupedLinear
from myserve.engine.batch_invariance.left_factors import HEADS, HeadFactors
from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.batch_invariance.own_matrices import ExactWeight, exact_weights
from myserve.engine.batch_invariance.patch import ExactLinear, packed_experts

__all__ = ["Holder", "Install", "Values", "holders"]

Install = Callable[[], None]  # cannot fail: it puts in place what is there already
Values = Mapping[str, Tensor]  # by the names of `WeightNames`


@dataclass(frozen=True, slots=True)
class Holder:
    """Weights that are derived from together. `prepare` takes new values of some of them."""

    names: tuple[str, ...]
    prepare: Callable[[Values], list[Install]]


def holders(model: nn.Module) -> Iterator[Holder]:
    """Yield all holders of a model, exact or not. Tied weights come once for each of their names."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        special: set[str] = set()
        for holder in _derived(prefix, module):
            special |= set(holder.names)
            yield holder
        for name in module.state_dict(keep_vars=True):
            if "." not in name and prefix + name not in special:
                yield _plain(module, name, prefix + name)


def _derived(prefix: str, module: Any) -> Iterator[Holder]:
    if isinstance(module, ExactLinear):
        yield _linear(module, prefix + "weight", prefix + "bias")
    elif isinstance(module, GroupedLinear):
        yield _experts(module, "packed_each", prefix, "weight", is_transposed=False)
    elif isinstance(getattr(module, HEADS[0], None), HeadFactors):
        yield from (_heads(module, name, prefix + name) for name in HEADS)
    elif hasattr(module, "packed_down"):
        up = "gate_up_proj" if module.has_gate else "up_proj"
        yield _experts(module, "packed_up", prefix, up, is_transposed=module.is_transposed)
        yield _experts(module, "packed_down", prefix, "down_proj", is_transposed=module.is_transposed)
    for name in exact_weights(module):
        yield _own_matrix(module, name, prefix)


def _linear(module: ExactLinear, weight: str, bias: str) -> Holder:
    def prepare(values: Values) -> list[Install]:
        packed = module.packed
        if weight in values:
            new = values[weight].T if module.is_transposed else values[weight]
            old_bias = packed.bias[: packed.out_features]
            packed = type(packed)(new.to(packed.dtype), values.get(bias, old_bias))
        else:
            packed = packed.with_bias(values[bias])
        return [lambda: module.replace(packed)]

    return Holder((weight, bias), prepare)


def _own_matrix(module: Any, name: str, prefix: str) -> Holder:
    """A weight that its module multiplies by itself; a router's, `weight`, has the bias packed with it."""
    weight, bias = prefix + name, prefix + "bias"
    has_bias = name == "weight"

    def prepare(values: Values) -> list[Install]:
        old: ExactWeight = getattr(module, name)
        new_bias = values.get(bias, module._parameters.get("bias")) if has_bias else None
        plain = values.get(weight, old.as_subclass(Tensor))
        exact = ExactWeight.of(_own(plain, like=old), new_bias)
        installs: list[Install] = [lambda: setattr(module, name, exact)]
        return installs + (_plain_installs(module, "bias", values.get(bias)) if has_bias else [])

    return Holder((weight, bias) if has_bias else (weight,), prepare)


def _heads(module: Any, attribute: str, name: str) -> Holder:
    def prepare(values: Values) -> list[Install]:
        old: list[PackedWeight] = getattr(module, attribute).packed
        factors = HeadFactors.of(packed_experts(values[name].to(old[0].dtype), None, type(old[0])))
        return [lambda: setattr(module, attribute, factors)]

    return Holder((name,), prepare)


def _experts(module: Any, attribute: str, prefix: str, name: str, *, is_transposed: bool) -> Holder:
    weight, bias = prefix + name, f"{prefix}{name}_bias"

    def prepare(values: Values) -> list[Install]:
        old: list[PackedWeight] = getattr(module, attribute)
        biases = values.get(bias, module._parameters.get(f"{name}_bias"))
        if weight in values:
            new = values[weight].to(old[0].dtype)
            new = new.transpose(1, 2) if is_transposed else new
            packed = packed_experts(new, biases, type(old[0]))
        else:
            assert biases is not None
            packed = [p.with_bias(b) for p, b in zip(old, biases, strict=True)]
        installs: list[Install] = [lambda: setattr(module, attribute, packed)]
        return installs + _plain_installs(module, f"{name}_bias", values.get(bias))

    return Holder((weight, bias), prepare)


def _plain(module: nn.Module, name: str, full_name: str) -> Holder:
    return Holder((full_name,), lambda values: _plain_installs(module, name, values[full_name]))


def _plain_installs(module: nn.Module, name: str, value: Tensor | None) -> list[Install]:
    """The parameter or buffer stays the object that it is, for tied ones are one object; its memory is exchanged."""
    if value is None:
        return []
    tensor = getattr(module, name)
    new = _own(value, like=tensor)

    def put() -> None:
        tensor.data = new

    return [put]


def _own(value: Tensor, *, like: Tensor) -> Tensor:
    """A copy on the device of `like`: the caller may change the value afterwards."""
    return torch.empty_like(like, memory_format=torch.contiguous_format).copy_(value).detach()
