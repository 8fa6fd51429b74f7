"""What a recording makes by kernels instead of tensor operations has PyTorch's bits, and what they cannot do stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from myserve.engine.steps.launches import Launches, Operation
from myserve.engine.steps.recorder import Pool, Recording

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "broadcast sum": lambda x, y: x + y[0],
    "broadcast product": lambda x, y: x * y[:, :1],
    "product of two": lambda x, y: x * y,
    "difference": lambda x, y: x - y[:, 2:3],
    "quotient": lambda x, y: x / y,
    "negative": lambda x, y: -x,
    "of two types": lambda x, y: x.float() * y + x,
    "a copy in another shape": lambda x, y: x.transpose(0, 1).reshape(-1),
    "to float32 and back": lambda x, y: (x.float() * y.float()).to(x.dtype),
    "joined": lambda x, y: torch.cat((-x[:, 1:], y), dim=-1),
    "joined in front": lambda x, y: torch.cat((x, y[:2], x), dim=0),
    "chosen": lambda x, y: torch.where(x.float() > y.float(), x, y),
    "compared with a number": lambda x, y: torch.where(x.float() >= 0.25, y, x),
    "numbers": lambda x, y: (x.float() * 3 - 0.1) / 7,
}
each_operation = pytest.mark.parametrize("name", OPERATIONS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _operations(recording: Recording) -> list[str]:
    return [part.func.__name__ for part in recording._parts if isinstance(part, Operation)]


@each_operation
@each_dtype
@pytest.mark.parametrize("shape", [(5, 9), (70, 300)], ids=str)
@torch.inference_mode()
def test_an_operation_is_a_launch_with_the_bits_of_pytorch(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x, y = (10 * torch.randn(2, *shape)).to(dtype)
    forward = OPERATIONS[name]
    recording = Recording(lambda: forward(x, y), Pool())
    assert [type(part) for part in recording._parts] == [Launches], _operations(recording)
    for _ in range(2):
        x.copy_(torch.randn(shape))
        y.copy_(10 * torch.randn(shape))
        assert torch.equal(recording.replay(), forward(x, y))


@torch.inference_mode()
def test_four_dimensions_of_different_strides_are_a_launch() -> None:
    wide = torch.randn(2, 3, 40, 5)
    x, angles = wide.permute(0, 2, 1, 3), torch.randn(2, 40, 1, 5)
    recording = Recording(lambda: (x[:, ::2] * angles[:, ::2]).sum(0), Pool())
    # PyTorch lays such a product out as x lies, which ours does not
    assert _operations(recording) == ["mul.Tensor", "sum.dim_IntList"]
    apart = Recording(lambda: x.reshape(2, 40, 15) * angles[:, :, 0, :1], Pool())
    assert not _operations(apart)
    wide.copy_(torch.randn(wide.shape))
    assert torch.equal(apart.replay(), x.reshape(2, 40, 15) * angles[:, :, 0, :1])


@torch.inference_mode()
def test_control_what_would_have_other_bits_stays_an_operation() -> None:
    """A number beside bfloat16 is not rounded to it first; whole numbers are no business of these kernels."""
    half, whole, one = torch.randn(4, 6).bfloat16(), torch.arange(6), torch.tensor(3.3)
    assert _operations(Recording(lambda: half * 1.001, Pool())) == ["mul.Tensor"]
    assert _operations(Recording(lambda: half * one, Pool())) == ["mul.Tensor"]
    assert _operations(Recording(lambda: whole + whole, Pool())) == ["add.Tensor"]
    assert _operations(Recording(lambda: half.double() + half, Pool())) == ["to.dtype", "add.Tensor"]
    assert _operations(Recording(lambda: half.float().exp(), Pool())) == ["exp.default"]
