"""Every forward pass with the same number of rows: each kernel of each library sees one shape, and has one order.

Libraries choose the order of a sum by the shape: matrix products by their rows (cuBLAS, MKL, oneDNN), on a GPU means
too. A step's rows are therefore cut into groups of one size, the last filled up with padding rows. A row's position
in a group, and what the others hold, change none of its bits; `packing_check` asks whether that is so here.

Decodes lose nothing by it where up to 64 rows cost what one does: as long as weights come from memory. A prefill reads
the weights once a group.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from myserve.engine.batch_invariance.patch import has_experts
from myserve.engine.scheduling.batch import ScheduledTokens
from myserve.engine.steps.inputs import Shape

__all__ = [
    "FIXED_EXPERTS",
    "FIXED_ROWS",
    "experts_implementation",
    "fixed_experts_forward",
    "fixed_shape",
    "groups",
    "keep_sums_whole",
    "use_experts",
]

log = logging.getLogger(__name__)

FIXED_ROWS = 64
FIXED_EXPERTS = "myserve_fixed_rows"  # what a model's `_experts_implementation` says


def groups(
    scheduled: Sequence[ScheduledTokens], wanted: Sequence[int], size: int
) -> Iterator[tuple[list[ScheduledTokens], list[int]]]:
    """The packed rows in groups of `size`, the last of what is left; and of each, which of its rows are wanted.

    Row i of the step is row i % size of group i // size. A part may be cut; its second part finds the first's keys.
    """
    group: list[ScheduledTokens] = []
    room, first = size, 0
    for part in scheduled:
        start, end = part.start, part.start + part.count
        while start < end:
            count = min(room, end - start)
            group.append(replace(part, start=start, count=count))
            start, room = start + count, room - count
            if room == 0:
                yield group, _inside(wanted, first, size)
                group, room, first = [], size, first + size
    if group:
        yield group, _inside(wanted, first, size)


def _inside(wanted: Sequence[int], first: int, size: int) -> list[int]:
    return [row - first for row in wanted if first <= row < first + size]


def fixed_shape(size: int, wanted: int) -> Shape:
    """Return a group's shape. The output layer runs on all rows or, where none is wanted, on one: never on none."""
    return Shape(size, size, size if wanted else 1)


def keep_sums_whole() -> None:
    """Set what PyTorch's notes on numerical accuracy and reproducibility say for CUDA, for the whole process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    log.info("this process: no TF32, no sums of matrix products in 16 bits, one workspace of cuBLAS")


def experts_implementation(model: nn.Module) -> str | None:
    """Return the name of the function that its experts look up; None for a dense model."""
    configs: Iterator[Any] = (module.config for module in model.modules() if has_experts(module))
    return next((config._experts_implementation for config in configs), None)


def use_experts(model: nn.Module, implementation: str | None) -> None:
    modules: list[Any] = [module for module in model.modules() if has_experts(module)]
    for module in modules:
        module.config._experts_implementation = implementation


def fixed_experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """All rows through all experts, and each row takes what its own gave; summed best first, in float32.

    hidden_states [T, D], top_k_index and top_k_weights [T, k]; gives [T, D]. One shape, whatever the routers say, and
    no number is looked at, which a recording could not. It costs no time where the weights come from memory: 64 rows
    call for nearly every expert's anyway.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    rows = hidden_states.expand(module.down_proj.shape[0], -1, -1)  # [E, T, D]
    inner = _each(module, up, rows)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _each(module, "down_proj", inner)
    if module.has_post_expert_norm:
        outer = module.post_expert_norm(outer)
    own = outer[top_k_index, torch.arange(len(hidden_states), device=outer.device)[:, None]]  # [T, k, D]
    parts = (own * top_k_weights[..., None]).float()
    total = parts[:, 0]
    for j in range(1, parts.shape[1]):
        total = total + parts[:, j]
    return total.to(hidden_states.dtype)


def _each(module: Any, name: str, rows: Tensor) -> Tensor:  # [E, T, K] -> [E, T, N]
    weights, biases = getattr(module, name), getattr(module, f"{name}_bias", None)
    out = torch.bmm(rows, weights if module.is_transposed else weights.transpose(1, 2))
    return out if biases is None else out + biases[:, None]


ALL_EXPERTS_FUNCTIONS.register(FIXED_EXPERTS, fixed_experts_forward)
