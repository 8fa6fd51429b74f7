"""Each activation is right to some units in the last place, and an element's bits are its own: no place shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from myserve.engine.batch_invariance.activations import reference
from myserve.engine.batch_invariance.pointwise import activation
from myserve.engine.kernels.elements.activations import ACTIVATIONS

each_activation = pytest.mark.parametrize("name", ACTIVATIONS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
THREADS = (1, 2, 3, 5, 6, 8)

# The largest error in units of the last place, down to an input: below, an error of the exponent is multiplied.
ULPS = {
    "sigmoid": (3, -80.0),
    "silu": (4, -80.0),
    "tanh": (2, -80.0),
    "erf": (3, -80.0),
    "gelu": (6, -13.0),
    "gelu_tanh": (4, -1.0),
    "gelu_new": (5, -1.0),
    "quick_gelu": (3, -1.0),
    "softplus": (4, -80.0),
    "mish": (5, -80.0),
}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def exact(name: str, x: Tensor) -> Tensor:
    """In float64, without the cancellation that PyTorch's own formula for GELU has."""
    if name == "gelu":
        return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))
    if name == "softplus":
        return F.softplus(x, threshold=200)
    if name == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return reference(name)(x)


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(100_000, generator=generator) * scale for scale in (1e-6, 1e-2, 1, 4)]
    return torch.cat([*normal, torch.linspace(-13, 13, 100_001), torch.linspace(-80, 80, 100_001)])


@each_activation
def test_an_activation_is_right_to_a_few_ulps_of_float64(name: str) -> None:
    most, lowest = ULPS[name]
    x = inputs()
    ours, right = activation(name, x).double(), exact(name, x.double())
    ulp = torch.exp2(torch.floor(torch.log2(right.abs().clamp_min(1e-36))) - 23)
    errors = (ours - right).abs() / ulp
    assert float(errors[x >= lowest].max()) <= most
    assert bool(((ours - right).abs() <= 2e-6 * right.abs() + 3e-7).all()), "beyond, it is small in itself"


@each_activation
def test_bfloat16_is_pytorchs_but_for_one_rounding(name: str) -> None:
    x = inputs().bfloat16()
    ours, theirs = activation(name, x).float(), reference(name)(x).float()
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
    if name not in ("gelu_new", "quick_gelu"):  # these round on the way, as models spell them
        assert torch.equal(activation(name, x), activation(name, x.float()).bfloat16())


def shows_its_place(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Whether an element has other bits in a part, in a slice of a wider tensor, or on another number of threads."""
    generator = torch.Generator().manual_seed(1)
    x = (4 * torch.randn(400, 1023, generator=generator)).to(dtype)
    torch.set_num_threads(1)
    whole = function(x)
    flat, values = x.flatten(), whole.flatten()
    for size in (1, 3, 7, 15, 16, 17, 31, 33, 1000):
        begin = 5 * size + 1
        if not torch.equal(function(flat[begin : begin + size].clone()), values[begin : begin + size]):
            return True
    wide = torch.zeros(400, 2 * 1023, dtype=dtype)
    wide[:, 511 : 511 + 1023] = x
    strided = wide[:, 511 : 511 + 1023]
    for threads in THREADS:
        torch.set_num_threads(threads)
        for rows in (400, 399, 101, 3):
            for given in (x, strided):
                if not torch.equal(function(given[:rows]), whole[:rows]):
                    return True
    return not torch.equal(function(x.T.contiguous().T), whole)


@each_dtype
@each_activation
def test_an_elements_bits_do_not_show_its_place(name: str, dtype: torch.dtype) -> None:
    assert not shows_its_place(lambda x: activation(name, x), dtype)


@pytest.mark.parametrize("name", ["sigmoid", "silu", "gelu", "gelu_tanh", "softplus", "mish"])
def test_control_pytorchs_do_show_it(name: str) -> None:
    assert shows_its_place(reference(name), torch.float32)


@each_dtype
@pytest.mark.parametrize(
    "function",
    [
        torch.exp, torch.expm1, torch.sin, torch.cos, torch.relu, torch.square, F.relu6, F.hardswish, F.leaky_relu,
        lambda x: x.abs().log1p(), lambda x: x.abs().sqrt(), lambda x: x.float().abs().rsqrt(),
        lambda x: x * 0.7071 + x / 3.3, lambda x: torch.pow(x, 3.0), lambda x: x.pow(2),
    ],
)  # fmt: skip
def test_the_library_functions_that_stay_do_not(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    assert not shows_its_place(function, dtype)


@each_dtype
@each_activation
def test_an_activation_times_up_is_rounded_twice(name: str, dtype: torch.dtype) -> None:
    both = (4 * torch.randn(37, 150)).to(dtype)
    gate, up = both[:, :75], both[:, 75:]
    assert torch.equal(activation(name, gate, up), activation(name, gate) * up)
    assert torch.equal(activation(name, gate[5:6], up[5:6])[0], activation(name, gate, up)[5])


@each_dtype
@each_activation
def test_an_activation_at_the_ends(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), float("inf"), 100.0, 0.0, -0.0, -30.0, -200.0]).to(dtype)
    ours, theirs = activation(name, x), reference(name)(x)
    assert ours[0].isnan() and ours[1] == (1 if name in ("sigmoid", "tanh", "erf") else float("inf"))
    torch.testing.assert_close(ours[2:], theirs[2:], atol=1e-6, rtol=1e-2)


def test_gpt2s_gelu_rounds_where_its_tensor_operations_do() -> None:
    x = inputs().bfloat16()
    ours, theirs = activation("gelu_new", x), reference("gelu_new")(x)
    assert float((ours != theirs).float().mean()) < 1e-3, "but for a tanh that lies between two bfloat16"
