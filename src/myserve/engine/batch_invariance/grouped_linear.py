"""A linear layer of several weights, each for its own run of rows (JetMoE's experts), by our own kernel.

Its module sorts rows by their expert, and gives how many each has. transformers' forward multiplies each run by a
library's product, whose order of summation is that of the run's length: by how many other tokens chose the expert.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from myserve.engine.batch_invariance.linear import PackedWeight, multiply_each

__all__ = ["GroupedLinear", "is_grouped_linear"]

_ARGUMENTS = ["self", "inputs", "expert_size"]
_PRODUCT = "F.linear(input_list[i], self.weight[i])"


class GroupedLinear(nn.Module):
    """Multiplies the first rows by the first weight, the next by the next. It holds packed weights alone."""

    def __init__(self, packed: list[PackedWeight]) -> None:
        super().__init__()
        self.packed_each = packed

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:  # [R, K], R in all -> [R, N]
        return multiply_each(self.packed_each, inputs, expert_size)


def is_grouped_linear(module: nn.Module) -> bool:
    """Return whether a module is such a layer, and no more.

    >>> is_grouped_linear(nn.Linear(1, 1))
    False
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 3 or len(module._parameters) > 1:
        return False
    forward: Any = type(module).forward
    return list(inspect.signature(forward).parameters) == _ARGUMENTS and _PRODUCT in inspect.getsource(
        forward
    )
