"""Norms, RoPE, activations and their gates, sums and row lookup by our kernels; CPU, bfloat16 or float32.

Each gives the bits of the tensor operations that a model of transformers spells out, but for the order of a norm's sum
and for activations, which PyTorch computes otherwise at the end of a thread's share (`activations`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from myserve.engine.kernels.elements.activations import activation_kernel
from myserve.engine.kernels.elements.gated_norm import gated_norm_kernel, scratch_bytes
from myserve.engine.kernels.elements.pointwise import (
    ROWS,
    add_kernel,
    gather_kernel,
    norm_kernel,
    rotate_kernel,
)
from myserve.engine.kernels.launch import this_thread, threads_for

__all__ = ["activation", "add", "gated_norm", "gather", "is_ours", "rms_norm", "rotate"]


def is_ours(*tensors: Tensor) -> bool:
    """Return whether the kernels take these: on a CPU, all of one element type, bfloat16 or float32."""
    dtype = tensors[0].dtype
    return dtype in (torch.bfloat16, torch.float32) and all(
        x.dtype == dtype and x.device.type == "cpu" for x in tensors
    )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension, in float32; x [..., D], weight [D].

    `rounds_first`: what is multiplied by the weight has been rounded to x's type (Llama), or not (Gemma, OLMo 2). A
    float32 x may have a weight of another type (Mamba's last norm, of a residual in float32); no other x may.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 0.0)
    tensor([0.8485, 1.1314])
    """
    if weight.dtype != x.dtype:
        if x.dtype != torch.float32:
            raise ValueError(f"a norm of {x.dtype} by weights of {weight.dtype} is not computed here")
        weight = weight.float()
    x, (rows, row, groups, group) = _as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    size, width = x.element_size(), x.shape[-1]
    norm_kernel(x.dtype)(
        _threads(rows, groups * width),
        x=x.data_ptr(), x_row=size * row, x_group=size * group, weight=weight.data_ptr(), out=out.data_ptr(),
        rows=rows, groups=groups, width=width, rounds_first=rounds_first, eps=eps, offset=offset,
    )  # fmt: skip
    return out


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, groups: int = 1, act: Literal["silu", "sigmoid"] = "silu",
    gates_first: bool = False, rounds_first: bool = True,
) -> Tensor:  # fmt: skip
    """Return norm(x) * weight * act(gate), in float32; all [..., D] but the weight [D], each of `groups` normed alone.

    `gates_first`: norm(x * act(gate)) * weight. `rounds_first`: what is normed is rounded to x's type before it is
    multiplied by the weight, and the product again.

    >>> gated_norm(torch.tensor([3.0, 4.0]), torch.tensor([100.0, 200.0]), torch.ones(2), 0.0, act="sigmoid")
    tensor([0.8485, 1.1314])
    """
    weight, gate = (y if y.dtype == x.dtype else y.to(x.dtype) for y in (weight, gate))
    (x, (rows, x_row)), (gate, (_, gate_row)) = _flat(x), _flat(gate)
    out = torch.empty(x.shape, dtype=x.dtype)
    size, width = x.element_size(), x.shape[-1] // groups
    threads, per_thread = _threads(2 * rows, groups * width), -(-scratch_bytes(width) // 64) * 64
    gated_norm_kernel(x.dtype)(
        threads, x=x.data_ptr(), x_row=size * x_row, gate=gate.data_ptr(), gate_row=size * gate_row,
        weight=weight.data_ptr(), out=out.data_ptr(), rows=rows, groups=groups, width=width, gates_first=gates_first,
        rounds_first=rounds_first, is_sigmoid=act == "sigmoid", scratch=this_thread().scratch(per_thread * threads),
        scratch_thread=per_thread, eps=eps,
    )  # fmt: skip
    return out


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Apply RoPE by halves: query [H, T, D], key [Hkv, T, D], cosine and sine [T, R]; R <= D, what lies beyond stays.

    >>> x = torch.tensor([[[1.0, 2.0]]])
    >>> rotate(x, x, torch.zeros(1, 2), torch.ones(1, 2))[0]
    tensor([[[-2.,  1.]]])
    """
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    cosine, sine = cosine.contiguous(), sine.contiguous()
    (heads, tokens, dim), key_heads, size = query.shape, key.shape[0], query.element_size()
    query_out, key_out = (torch.empty(tokens, n, dim, dtype=query.dtype) for n in (heads, key_heads))
    rotate_kernel(query.dtype)(
        _threads(tokens, (heads + key_heads) * dim),
        query=query.data_ptr(), query_token=size * query.stride(1), query_head=size * query.stride(0),
        key=key.data_ptr(), key_token=size * key.stride(1), key_head=size * key.stride(0),
        cosine=cosine.data_ptr(), sine=sine.data_ptr(), angle_row=size * cosine.shape[1],
        query_out=query_out.data_ptr(), key_out=key_out.data_ptr(),
        tokens=tokens, query_heads=heads, key_heads=key_heads, head_dim=dim, rotary_dim=cosine.shape[1],
    )  # fmt: skip
    return query_out.transpose(0, 1), key_out.transpose(0, 1)


def activation(name: str, x: Tensor, up: Tensor | None = None) -> Tensor:
    """Apply one of `ACTIVATIONS` to each element of x, and multiply by `up` where one is given: [..., D].

    The activation is rounded to x's type before it is multiplied, as in `act(gate) * up`. CPU; bfloat16 or float32,
    others by way of float32, as PyTorch has it.

    >>> activation("silu", torch.tensor([0.0, 100.0]), torch.tensor([1.0, 2.0]))
    tensor([  0., 200.])
    """
    if not is_ours(x):
        out = activation(name, x.float()).to(x.dtype)
        return out if up is None else out * up
    x, (rows, x_row) = _flat(x)
    address = up_row = 0
    if up is not None:
        up, (_, up_row) = _flat(up)
        address = up.data_ptr()
    out = torch.empty(x.shape, dtype=x.dtype)
    size, width = x.element_size(), x.shape[-1]
    activation_kernel(name, x.dtype)(
        _threads(rows, width),
        x=x.data_ptr(), x_row=size * x_row, up=address, up_row=size * up_row, out=out.data_ptr(),
        rows=rows, width=width,
    )  # fmt: skip
    return out


def add(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b, of one shape [..., D], both contiguous."""
    out = torch.empty(a.shape, dtype=a.dtype)
    width = a.shape[-1]
    rows = a.numel() // width
    add_kernel(a.dtype)(
        _threads(rows, width), a=a.data_ptr(), b=b.data_ptr(), out=out.data_ptr(), rows=rows, width=width
    )
    return out


def gather(table: Tensor, indices: Tensor) -> Tensor:
    """Return table[indices]: [N, D] by [...] int64 to [..., D]; both contiguous.

    An index out of range gives a row of NaN.

    >>> gather(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0, 2]))
    tensor([[3., 4.],
            [1., 2.],
            [nan, nan]])
    """
    out = torch.empty((*indices.shape, table.shape[1]), dtype=table.dtype)
    gather_kernel()(
        _threads(indices.numel(), table.shape[1]),
        table=table.data_ptr(), table_rows=table.shape[0], indices=indices.data_ptr(), out=out.data_ptr(),
        rows=indices.numel(), row_bytes=table.shape[1] * table.element_size(),
    )  # fmt: skip
    return out


def _threads(rows: int, width: int) -> int:
    return threads_for(16 * rows * width) if rows > ROWS else 1


def _flat(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """x as rows [..., D] at one distance: (x, (rows, distance)); copied where it is not."""
    x, (rows, row, groups, _) = _as_rows(x)
    if groups == 1:
        return x, (rows, row)
    x = x.contiguous()
    return x, (rows * groups, x.shape[-1])


def _as_rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """x [..., D] as [rows, groups, D] with any two distances: a slice of a joined product, and its heads."""
    if x.stride(-1) == 1:
        lead = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
        if not lead:
            return x, (1, x.shape[-1], 1, x.shape[-1])
        if len(lead) == 1:
            return x, (*lead[0], 1, x.shape[-1])
        if len(lead) == 2:
            return x, (*lead[0], *lead[1])
    x = x.contiguous()
    return x, (x.numel() // x.shape[-1], x.shape[-1], 1, x.shape[-1])
