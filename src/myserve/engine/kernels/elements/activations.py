"""Activation functions whose value at an element depends on that element alone: not on its place, stride or thread.

PyTorch's sigmoid, GELU, SiLU, mish and softplus have one code for whole vectors and another for what is left at the
end of a thread's share, so that an element's last bits tell how many rows were computed beside it. Here each function
is one sequence of float32 additions, multiplications and divisions, which round alike in a vector and alone: what is
fused is fused by name, nothing is reassociated. bfloat16 is widened first and rounded once at the end, except where a
model spells its function out in tensor operations (`gelu_new`, `quick_gelu`) and so rounds after each.

Errors are the largest found against float64, in units of the last place of float32 (ulp), over 5 million inputs from
-80 to 80; `tests/engine/kernels/elements/test_activations.py` repeats it with fewer.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import overload

from myserve.engine.kernels.elements.pointwise import (
    ROWS,
    as_bits,
    as_float,
    element_kind,
    fused,
    rounded,
    wide,
)
from myserve.engine.kernels.lanes import next_item, size_of, view
from myserve.engine.kernels.launch import Kernel, fingerprint

__all__ = ["ACTIVATIONS", "activation_kernel", "exp_of_negative", "sigmoid", "silu", "softplus"]

# `up` is the address of what the activation is multiplied by (SwiGLU, GeGLU), or 0.
ACTIVATE = ("x", "x_row", "up", "up_row", "out", "rows", "width")

Kind = Any  # a value whose type is an element's: uint16 (bfloat16's bits) or float32
Record = Any  # ACTIVATE


_inlined = njit(error_model="numpy", forceinline=True)  # a loop with a call in it is made of no vectors


@_inlined
def exp_of_negative(x: Any) -> Any:
    """exp(x) for x <= 0; 1e-38 below -87.5; NaN stays. 1 ulp.

    2^n * p(r) with n = round(x / ln 2): Cody and Waite's reduction and a Taylor polynomial of degree 7.
    """
    x = max(x, np.float32(-87.5))
    # 1.5 * 2^23: adding it rounds to an integer, which stays in the low bits
    shifted = fused(x, np.float32(1.4426950408889634), np.float32(12582912.0))
    n = shifted - np.float32(12582912.0)
    r = fused(n, np.float32(-0.693359375), x)
    r = fused(n, np.float32(2.12194440e-4), r)
    p = np.float32(1 / 5040)
    p = fused(p, r, np.float32(1 / 720))
    p = fused(p, r, np.float32(1 / 120))
    p = fused(p, r, np.float32(1 / 24))
    p = fused(p, r, np.float32(1 / 6))
    p = fused(p, r, np.float32(0.5))
    p = fused(p, r, np.float32(1.0))
    p = fused(p, r, np.float32(1.0))
    return p * as_float((as_bits(shifted) + np.uint32(127)) << np.uint32(23))


@_inlined
def _exp_of_half_square(size: Any) -> Any:
    """exp(-size^2 / 2) for 0 <= size <= 13.2; NaN stays. 2 ulp.

    The square is kept whole, as q + rest: an error of it is multiplied by its own size. Reduced as in
    `exp_of_negative`, and the polynomial is one of exp(-r / 2), of degree 6, found by least squares at Chebyshev's
    points.
    """
    q = size * size
    rest = fused(size, size, -q)
    # 1.5 * 2^23, and the bias of an exponent: what stays in the low bits is the exponent of the result
    shifted = fused(q, np.float32(-0.7213475204444817), np.float32(12583039.0))
    n = shifted - np.float32(12583039.0)
    r = fused(n, np.float32(1.38671875), q)
    r = fused(n, np.float32(-4.2438888e-4), r) + rest
    p = np.float32(2.1608107999782078e-05)
    p = fused(p, r, np.float32(-0.0002617166319396347))
    p = fused(p, r, np.float32(0.002604273147881031))
    p = fused(p, r, np.float32(-0.020833022892475128))
    p = fused(p, r, np.float32(0.12499997764825821))
    p = fused(p, r, np.float32(-0.5))
    p = fused(p, r, np.float32(1.0))
    return p * as_float(as_bits(shifted) << np.uint32(23))


@_inlined
def _normal_tail(size: Any) -> Any:
    """The normal distribution's probability beyond size >= 0, to 4 ulp up to 13; 0 or 1e-38 beyond.

    exp(-size^2 / 2) times a polynomial in (size - 4) / (size + 4), over size + 4: what remains when the exponential
    is divided out is smooth.
    """
    size = min(size, np.float32(13.2))
    e = _exp_of_half_square(size)
    inverse = np.float32(1.0) / (size + np.float32(4.0))
    u = (size - np.float32(4.0)) * inverse
    p = np.float32(-0.00012952838733326644)
    p = fused(p, u, np.float32(0.00018462978187017143))
    p = fused(p, u, np.float32(0.0015718587674200535))
    p = fused(p, u, np.float32(-0.003514982294291258))
    p = fused(p, u, np.float32(-0.007526726927608252))
    p = fused(p, u, np.float32(0.06040414422750473))
    p = fused(p, u, np.float32(-0.1865231990814209))
    p = fused(p, u, np.float32(0.38713687658309937))
    p = fused(p, u, np.float32(-0.607896625995636))
    p = fused(p, u, np.float32(0.7552851438522339))
    return e * (p * inverse)


@_inlined
def _sigmoid(x: Any) -> Any:
    e = exp_of_negative(-abs(x))
    return (np.float32(1.0) if x >= np.float32(0.0) else e) / (np.float32(1.0) + e)


@_inlined
def _tanh(x: Any) -> Any:
    size = abs(x)
    e = exp_of_negative(np.float32(-2.0) * size)
    far = (np.float32(1.0) - e) / (np.float32(1.0) + e)
    far = -far if x < np.float32(0.0) else far
    z = x * x
    p = np.float32(-0.006096940953284502)
    p = fused(p, z, np.float32(0.02099735662341118))
    p = fused(p, z, np.float32(-0.05385095253586769))
    p = fused(p, z, np.float32(0.13332770764827728))
    p = fused(p, z, np.float32(-0.333333283662796))
    near = fused(x, z * p, x)
    return near if size < np.float32(0.625) else far


@_inlined
def sigmoid(kind: Kind, x: Any) -> Any:
    """1 / (1 + exp(-x)), to 3 ulp."""
    return _sigmoid(x)


@_inlined
def silu(kind: Kind, x: Any) -> Any:
    """x * sigmoid(x), the gate of SwiGLU, to 4 ulp."""
    return x * _sigmoid(x)


@_inlined
def tanh(kind: Kind, x: Any) -> Any:
    """The hyperbolic tangent, to 2 ulp."""
    return _tanh(x)


@_inlined
def erf(kind: Kind, x: Any) -> Any:
    """The error function, to 3 ulp."""
    size = abs(x)
    far = np.float32(1.0) - np.float32(2.0) * _normal_tail(size * np.float32(1.4142135623730951))
    far = -far if x < np.float32(0.0) else far
    z = x * x
    p = np.float32(8.549392805434763e-05)
    p = fused(p, z, np.float32(-0.0008183744503185153))
    p = fused(p, z, np.float32(0.005204533692449331))
    p = fused(p, z, np.float32(-0.026860766112804413))
    p = fused(p, z, np.float32(0.11283719539642334))
    p = fused(p, z, np.float32(-0.37612634897232056))
    p = fused(p, z, np.float32(1.128379225730896))
    return x * p if size < np.float32(0.875) else far


@_inlined
def gelu(kind: Kind, x: Any) -> Any:
    """x times the normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415), to 6 ulp above -13.

    PyTorch adds 1 to an erf near -1, so that its value loses all digits from x = -5 on; this does not.
    """
    tail = _normal_tail(abs(x))
    return x * (np.float32(1.0) - tail if x > np.float32(0.0) else tail)


@_inlined
def gelu_tanh(kind: Kind, x: Any) -> Any:
    """GELU's approximation by a tanh, which is x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3).

    To 4 ulp above -1; below, the error of 2u is multiplied by 2u: 40 ulp at -5, where the value is -2e-7.
    """
    size = abs(x)
    double = np.float32(1.5957691216057308) * (size + np.float32(0.044715) * (size * size * size))
    e = exp_of_negative(-double)
    return x * ((np.float32(1.0) if x >= np.float32(0.0) else e) / (np.float32(1.0) + e))


@_inlined
def gelu_new(kind: Kind, x: Any) -> Any:
    """GELU's approximation as GPT-2 spells it, 0.5 * x * (1 + tanh(...)), rounded after each step; 5 ulp above -1."""
    cube = wide(rounded(kind, wide(rounded(kind, x * x)) * x))
    inner = wide(rounded(kind, x + wide(rounded(kind, np.float32(0.044715) * cube))))
    inner = wide(rounded(kind, np.float32(0.7978845608028654) * inner))
    one_more = wide(rounded(kind, np.float32(1.0) + wide(rounded(kind, _tanh(inner)))))
    return wide(rounded(kind, np.float32(0.5) * x)) * one_more


@_inlined
def quick_gelu(kind: Kind, x: Any) -> Any:
    """x * sigmoid(1.702 x), as CLIP spells it, rounded after each operation; 3 ulp above -1."""
    scaled = wide(rounded(kind, np.float32(1.702) * x))
    return x * wide(rounded(kind, _sigmoid(scaled)))


@_inlined
def softplus(kind: Kind, x: Any) -> Any:
    """log(1 + exp(x)), to 4 ulp."""
    e = exp_of_negative(-abs(x))
    s = e / (np.float32(2.0) + e)  # log(1 + e) = 2 artanh(s), s <= 1/3
    z = s * s
    p = np.float32(0.24413065612316132)
    p = fused(p, z, np.float32(0.21393251419067383))
    p = fused(p, z, np.float32(0.2862072288990021))
    p = fused(p, z, np.float32(0.3999869227409363))
    p = fused(p, z, np.float32(0.6666668057441711))
    p = fused(p, z, np.float32(2.0))
    small = s * p
    return x + small if x > np.float32(0.0) else small


@_inlined
def mish(kind: Kind, x: Any) -> Any:
    """x * tanh(softplus(x)) (Misra, arXiv:1908.08681), by w = exp(x): (w^2 + 2w) / (w^2 + 2w + 2); to 5 ulp."""
    e = exp_of_negative(-abs(x))
    positive = np.float32(1.0) + np.float32(2.0) * e  # both sides divided by w^2 where w is large
    negative = e * (e + np.float32(2.0))
    above = positive if x > np.float32(0.0) else negative
    more = np.float32(2.0) * (e * e) if x > np.float32(0.0) else np.float32(2.0)
    return x * (above / (above + more))


_FUNCTIONS = (sigmoid, silu, tanh, erf, gelu, gelu_tanh, gelu_new, quick_gelu, softplus, mish)
ACTIVATIONS = tuple(function.__name__ for function in _FUNCTIONS)


def _activate(number: int, a: Record, kind: Kind) -> None:
    """out = f(x), times `up` where there is one; [rows, width]."""
    raise NotImplementedError("compiled code alone")


@njit(error_model="numpy")
def _multiply_row(kind: Kind, up: Any, out: Any, width: int) -> None:
    for d in range(width):
        out[d] = rounded(kind, wide(out[d]) * wide(up[d]))


@overload(_activate, prefer_literal=True, jit_options={"error_model": "numpy"})
def _overload_activate(number: Any, a: Any, kind: Any) -> Any:
    if not isinstance(number, types.IntegerLiteral):
        return None
    function = _FUNCTIONS[number.literal_value]

    # Numba wants the names and annotations of the outer function
    def activate(number: Any, a: Any, kind: Any) -> Any:
        size, width = size_of(kind), a.width
        item = next_item(a)
        while item * ROWS < a.rows:
            for row in range(item * ROWS, min(a.rows, item * ROWS + ROWS)):
                x = carray(view(a.x + row * a.x_row, kind), width)
                out = carray(view(a.out + row * width * size, kind), width)
                for d in range(width):
                    out[d] = rounded(kind, function(kind, wide(x[d])))
                if a.up != 0:
                    _multiply_row(kind, carray(view(a.up + row * a.up_row, kind), width), out, width)
            item = next_item(a)

    return activate


@functools.cache
def activation_kernel(name: str, dtype: torch.dtype) -> Kernel:
    """Return the kernel of one of `ACTIVATIONS` for one element type, compiled or read from the cache on first use."""
    source, kind, number = fingerprint(), element_kind(dtype), ACTIVATIONS.index(name)

    def activate(p: Any) -> None:
        if source >= 0:
            _activate(number, carray(p, 1)[0], kind)

    return Kernel(ACTIVATE, activate)
