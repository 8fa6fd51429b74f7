"""A model's activation functions by kernels of our own, whether it calls them as modules or in its own code.

PyTorch's sigmoid, GELU, SiLU, mish and softplus give an element other bits in a vector than at the end of a thread's
share (`kernels`). A module that is one of them gets our kernel as its forward. Any other module whose code
calls one of them runs its forward under `ExactFunctions`, which answers these calls and no others. A product of complex
numbers is such a function, too: RoPE as Llama 4 and DeepSeek-V2 write it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import activations as theirs

from myserve.engine.batch_invariance import pointwise

__all__ = ["ExactFunctions", "activation_of", "calls_activations", "install_activations", "reference"]

Apply = Callable[[str, Tensor], Tensor]  # one of `kernels.elements.activations.ACTIVATIONS`, of each element

_MODULES: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Mish: "mish",
    theirs.SiLUActivation: "silu",
    theirs.MishActivation: "mish",
    theirs.QuickGELUActivation: "quick_gelu",
    theirs.NewGELUActivation: "gelu_new",
    theirs.AccurateGELUActivation: "gelu_new",
}


def activation_of(module: object) -> str | None:
    """Return the name of the kernel that computes what an activation module does, or None.

    A subclass may do something else, so it is None.

    >>> activation_of(nn.GELU(approximate="tanh")), activation_of(theirs.ACT2FN["gelu"]), activation_of(nn.ReLU())
    ('gelu_tanh', 'gelu', None)
    """
    kind: Any = type(module)
    if kind in _MODULES:
        return _MODULES[kind]
    if kind is nn.GELU:
        return _gelu_name(module.approximate)  # type: ignore[attr-defined]
    if kind in (theirs.GELUActivation, theirs.GELUTanh):
        act = module.act  # type: ignore[attr-defined]  # one of its own methods where it spells the function out
        if isinstance(act, functools.partial) and act.func is F.gelu and not act.args:
            return _gelu_name(act.keywords.get("approximate", "none"))
        return "gelu" if act is F.gelu else None
    return None


def _gelu_name(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


_CUBE = 0.044715
_REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_new": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + _CUBE * torch.pow(x, 3.0))))
    ),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "softplus": F.softplus,
    "mish": F.mish,
}


def reference(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation in PyTorch's operations: the same but for last bits, on any device, with gradients.

    >>> reference("tanh")(torch.zeros(2))
    tensor([0., 0.])
    """
    return _REFERENCES[name]


def _gelu(apply: Apply, x: Tensor, approximate: str = "none") -> Tensor:
    return apply(_gelu_name(approximate), x)


def _softplus(apply: Apply, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    scaled = x if beta == 1 else x * beta
    curved = apply("softplus", scaled)
    return torch.where(scaled > threshold, x, curved if beta == 1 else curved / beta)


def _elu(apply: Apply, x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """PyTorch's expm1 treats every element alike, unlike its elu, selu and celu."""
    below = (torch.expm1(x.float().clamp(max=0) * input_scale) * (alpha * scale)).to(x.dtype)
    return torch.where(x > 0, x * scale, below)


def _plain_elu(apply: Apply, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return _elu(apply, x, alpha)


def _selu(apply: Apply, x: Tensor, inplace: bool = False) -> Tensor:
    return _elu(apply, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _celu(apply: Apply, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return _elu(apply, x, alpha, input_scale=1 / alpha)


def _rsqrt(apply: Apply, x: Tensor) -> Tensor:
    """PyTorch's rounds a bfloat16's root before it is inverted, or not, by the place; float32's is exact division."""
    return x.float().rsqrt().to(x.dtype)


def _named(name: str) -> Callable[..., Tensor]:
    def call(apply: Apply, x: Tensor, inplace: bool = False) -> Tensor:
        return apply(name, x)

    return call


def _glu(apply: Apply, x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.chunk(2, dim)
    return first * apply("sigmoid", second)


def _log_sigmoid(apply: Apply, x: Tensor) -> Tensor:
    return -apply("softplus", -x)


# PyTorch's functions and what is computed instead: (apply, *their arguments).
_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, torch.special.expit), _named("sigmoid")),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _named("tanh")),
    **dict.fromkeys((torch.erf, Tensor.erf, torch.special.erf), _named("erf")),
    F.silu: _named("silu"),
    F.mish: _named("mish"),
    F.gelu: _gelu,
    F.softplus: _softplus,
    F.logsigmoid: _log_sigmoid,
    F.glu: _glu,
    F.elu: _plain_elu,
    **dict.fromkeys((F.selu, torch.selu), _selu),
    **dict.fromkeys((F.celu, torch.celu), _celu),
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt), _rsqrt),
}
_IN_PLACE: dict[Any, Any] = {
    Tensor.sigmoid_: Tensor.sigmoid,
    torch.sigmoid_: Tensor.sigmoid,
    Tensor.tanh_: Tensor.tanh,
    torch.tanh_: Tensor.tanh,
    Tensor.erf_: Tensor.erf,
    Tensor.rsqrt_: Tensor.rsqrt,
}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__}  # where both factors are complex
# The names under which code calls these; complex numbers are made by the last.
_NAMES = {f.__name__ for f in (*_FUNCTIONS, *_IN_PLACE)} | {"view_as_complex"}


def _complex_product(a: Tensor, b: Tensor) -> Tensor:
    """PyTorch's fuses the two products of a part in a vector, or not, by the place."""
    (x, y), (u, v) = (torch.view_as_real(factor).unbind(-1) for factor in (a, b))
    return torch.complex(x * u - y * v, x * v + y * u)


def _are_complex(args: tuple[Any, ...]) -> bool:
    return all(isinstance(x, Tensor) and x.dtype == torch.complex64 and x.device.type == "cpu" for x in args)


class ExactFunctions(TorchFunctionMode):
    """Answers PyTorch's activation functions on CPU tensors by our kernels, inside the block.

    `apply` computes one of `ACTIVATIONS` by its name: the engine's is `pointwise.activation`, the trainer's
    has gradients. What is asked for with an `out`, and what lies on another device, stays PyTorch's.

    >>> with ExactFunctions(pointwise.activation):
    ...     torch.sigmoid(torch.zeros(2))
    tensor([0.5000, 0.5000])
    """

    def __init__(self, apply: Apply) -> None:
        super().__init__()
        self._apply = apply

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and not kwargs and _are_complex(args):
            return _complex_product(*args)
        exact = _FUNCTIONS.get(_IN_PLACE.get(func, func))
        x = args[0] if args else kwargs.get("input")
        if exact is None or "out" in kwargs or not _takes(x):
            return func(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        out = exact(self._apply, x, *args[1:], **rest)
        if func in _IN_PLACE:
            args[0].copy_(out)
            return args[0]
        return out


def _takes(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def install_activations(model: nn.Module, apply: Apply = pointwise.activation) -> int:
    """Replace, in place, the forward of every module that is or calls an activation; return how many there were."""
    found = 0
    for module in model.modules():
        if (name := activation_of(module)) is not None:
            forward: Any = MethodType(functools.partial(_forward, apply, name), module)
        elif calls_activations(module):
            forward = _under(ExactFunctions(apply), module.forward)
        else:
            continue
        module.forward = forward
        found += 1
    return found


def _forward(apply: Apply, name: str, module: nn.Module, x: Tensor) -> Tensor:
    return apply(name, x)


def _under(mode: ExactFunctions, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return wrapped


def calls_activations(module: nn.Module) -> bool:
    """Return whether a module's own code, or what it calls, names one of PyTorch's activations.

    >>> class Gated(nn.Module):
    ...     def forward(self, x):
    ...         return x * self.gate(x)
    ...     def gate(self, x):
    ...         return torch.sigmoid(x)
    >>> calls_activations(Gated()), calls_activations(nn.Linear(1, 1))
    (True, False)
    """
    kind = type(module)
    held = [value.func if isinstance(value, functools.partial) else value for value in vars(module).values()]
    if any(isinstance(value, Callable) and value in _FUNCTIONS for value in held):  # type: ignore[arg-type]
        return True
    seen: set[CodeType] = set()
    starts = [found for name in ("forward", "_apply_gate") for found in _methods(kind, name)]
    return any(_NAMES & set(names) for start in starts for names in _called(start, kind, seen))


def _methods(kind: type, name: str) -> list[Any]:
    """Every definition of a method, overridden ones too: `super` may call them."""
    return [vars(base)[name] for base in kind.__mro__ if name in vars(base)]


def _called(function: Any, owner: type, seen: set[CodeType]) -> Iterator[tuple[str, ...]]:
    """The names that a function uses, and those of what it calls on its class or by a global name."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return
    seen.add(function.__code__)
    for names in _names(function.__code__):
        yield names
        for name in names:
            # Attention is the engine's, never the model's own.
            if name == "eager_attention_forward":
                continue
            for found in (*_methods(owner, name), function.__globals__.get(name)):
                if isinstance(found, FunctionType) and not found.__module__.startswith("torch."):
                    yield from _called(found, owner, seen)


def _names(code: CodeType) -> Iterator[tuple[str, ...]]:
    """`code`'s, and those of the functions and comprehensions inside it."""
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
