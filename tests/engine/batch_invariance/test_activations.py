"""Every activation that transformers knows, as a module or as a function, treats all elements alike once installed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2CLS, ACT2FN

from myserve.engine.batch_invariance import pointwise
from myserve.engine.batch_invariance.activations import (
    ExactFunctions,
    activation_of,
    calls_activations,
    install_activations,
)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def shows_its_place(function: Any, dtype: torch.dtype) -> bool:
    """Whether parts, a stride or three threads give an element other bits."""
    x = (4 * torch.randn(300, 1023, generator=torch.Generator().manual_seed(0))).to(dtype)
    torch.set_num_threads(1)
    whole = function(x)
    wide = torch.zeros(300, 1100, dtype=dtype)
    wide[:, :1023] = x
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for rows in (300, 299, 7, 1):
            for given in (x[:rows], wide[:rows, :1023]):
                if not torch.equal(function(given), whole[:rows]):
                    return True
    return False


@each_dtype
@pytest.mark.parametrize("name", sorted(set(ACT2CLS) - {"prelu"}))
def test_every_activation_of_transformers_treats_elements_alike(name: str, dtype: torch.dtype) -> None:
    """prelu is a comparison and a product, with a weight."""
    module: Any = nn.Sequential(ACT2FN[name]).to(dtype)
    before = copy.deepcopy(module)
    install_activations(module)
    x = torch.randn(7, 33).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(module(x), before(x), rtol=2**-6, atol=2e-3)
        assert not shows_its_place(module, dtype)


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "silu", "quick_gelu", "sigmoid", "mish"])
def test_control_not_installed_they_do_not(name: str) -> None:
    assert shows_its_place(ACT2FN[name], torch.float32)


FUNCTIONS: list[Any] = [
    torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit, torch.tanh, F.tanh, torch.erf, F.silu, F.gelu,
    F.mish, F.softplus, F.logsigmoid, F.elu, F.selu, F.celu, torch.nn.functional.glu,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: F.softplus(x, 2.0, 5.0), lambda x: F.elu(x, 0.5),
    lambda x: x.abs().rsqrt(), lambda x: x.clone().sigmoid_(), lambda x: x.clone().tanh_(),
    lambda x: torch.sigmoid(input=x), lambda x: F.silu(x.clone(), inplace=True),
]  # fmt: skip


@each_dtype
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_is_pytorchs_and_treats_elements_alike(function: Any, dtype: torch.dtype) -> None:
    def exact(x: Tensor) -> Any:
        if function is F.glu:  # of an even width
            x = torch.cat([x, x], dim=-1)
        with ExactFunctions(pointwise.activation):
            return function(x)

    x = (4 * torch.randn(50, 31)).to(dtype)
    theirs = function(torch.cat([x, x], dim=-1) if function is F.glu else x)
    torch.testing.assert_close(exact(x), theirs, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=2e-6)
    assert not shows_its_place(exact, dtype)


def test_what_is_not_on_the_cpu_or_no_float_stays_pytorchs() -> None:
    with ExactFunctions(pointwise.activation):
        assert torch.sigmoid(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64
        assert torch.sigmoid(torch.zeros(2, device="meta")).device.type == "meta"
        out = torch.empty(2)
        assert torch.sigmoid(torch.zeros(2), out=out) is out
        assert torch.sigmoid(torch.zeros(2, dtype=torch.int64)).dtype == torch.float32


def test_a_functions_effect_ends_with_the_block() -> None:
    calls = []

    def apply(name: str, x: Tensor) -> Tensor:
        calls.append(name)
        return pointwise.activation(name, x)

    with ExactFunctions(apply):
        torch.tanh(torch.zeros(3))
        torch.exp(torch.zeros(3))
    torch.tanh(torch.zeros(3))
    assert calls == ["tanh"]


def _soft_cap(x: Tensor) -> Tensor:
    return 30 * torch.tanh(x / 30)


class Capped(nn.Module):
    """Calls one in a function of its file, from a method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.capped(x)

    def capped(self, x: Tensor) -> Tensor:
        return next(_soft_cap(row) for row in (x,))


class Held(nn.Module):
    """Holds one as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.function = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 2


def test_modules_that_call_one_are_found_by_their_code() -> None:
    assert [calls_activations(module) for module in (Capped(), Held(), Plain())] == [True, True, False]
    both = nn.Sequential(Capped(), Held(), Plain(), nn.GELU())
    assert install_activations(both) == 3
    assert "forward" not in vars(both[2])
    assert not shows_its_place(both, torch.float32)


def test_a_subclass_is_not_taken_for_what_it_overrides() -> None:
    class Doubled(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert activation_of(Doubled()) is None
    module = nn.Sequential(Doubled())
    install_activations(module)
    x = torch.randn(3, 5)
    assert torch.equal(module(x), 2 * pointwise.activation("silu", x))


@torch.inference_mode()
def test_a_product_of_complex_numbers_is_pytorchs_and_treats_elements_alike() -> None:
    """Of one head, whose rows lie side by side: RoPE of Llama 4 and DeepSeek-V2."""
    torch.manual_seed(0)
    x = torch.view_as_complex(torch.randn(1, 301, 1, 6, 2))
    turns = torch.polar(torch.ones(1, 301, 1, 6), 50 * torch.randn(1, 301, 1, 6))
    parts = (1, 2, 5, 13, 280)

    def alike() -> bool:
        whole = x * turns
        return torch.equal(
            whole,
            torch.cat([a * b for a, b in zip(x.split(parts, 1), turns.split(parts, 1), strict=True)], 1),
        )

    with ExactFunctions(pointwise.activation):
        assert alike()
        torch.testing.assert_close(x * turns, (x.to(torch.complex128) * turns).to(torch.complex64))
    assert not alike()  # the control
