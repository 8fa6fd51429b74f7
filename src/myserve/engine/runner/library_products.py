"""The modules of a model that multiply by a library's product, whose order of summation follows the number of rows.

Asked where the self-test has found a model's rows dependent, for the sentence that says why it is not served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from myserve.engine.mixers.attention_observer import AttentionObserver
from myserve.engine.mixers.attention_pass import using
from myserve.engine.mixers.recurrent_call import RecurrentCall

__all__ = ["library_products"]

TOKENS = 4
_aten = torch.ops.aten
_INNER: dict[Any, Callable[[tuple[Any, ...]], int]] = {  # a product's number of terms
    _aten.linear.default: lambda args: args[0].shape[-1],
    _aten.matmul.default: lambda args: args[0].shape[-1],
    _aten.einsum.default: lambda _: 2,
    _aten.mm.default: lambda args: args[0].shape[-1],
    _aten.bmm.default: lambda args: args[0].shape[-1],
    _aten.addmm.default: lambda args: args[1].shape[-1],
    _aten.baddbmm.default: lambda args: args[1].shape[-1],
    _aten.mv.default: lambda args: args[0].shape[-1],
    _aten.dot.default: lambda args: args[0].shape[-1],
}


@torch.inference_mode()
def library_products(model: Any) -> list[str]:
    """Return the classes of modules that multiply so in a forward pass over a few tokens, in their order.

    A product of one term, as of positions and frequencies, has one order.
    """
    found: dict[str, None] = {}
    with _inside(model) as stack, using(_Unwatched(type(model).__name__, stack)), _Watch(found, stack):
        ids = torch.arange(TOKENS, device=model.device)[None]
        model(input_ids=ids, position_ids=ids, use_cache=False)
    return list(found)


class _Unwatched(AttentionObserver):
    """Attends by products of PyTorch's, for this forward pass alone: they are no module's."""

    def __init__(self, model_name: str, stack: list[str]) -> None:
        super().__init__(model_name)
        self._stack = stack

    def attend(self, *args: Any) -> Tensor:
        self._stack.append("")
        try:
            return super().attend(*args)
        finally:
            self._stack.pop()

    def mix(self, call: RecurrentCall) -> Tensor:
        self._stack.append("")
        try:
            return super().mix(call)
        finally:
            self._stack.pop()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is untyped
    def __init__(self, found: dict[str, None], stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found, self._stack = found, stack

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        terms = _INNER.get(func)
        if terms is not None and terms(args) > 1 and "".join(self._stack[-1:]):
            self._found[self._stack[-1]] = None
        return func(*args, **(kwargs or {}))


@contextmanager
def _inside(model: torch.nn.Module) -> Iterator[list[str]]:
    """Keep the classes of the modules that are running, the innermost last."""
    stack: list[str] = []
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda own, _: stack.append(type(own).__name__)))
        hooks.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()
