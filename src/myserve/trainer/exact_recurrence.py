"""Recurrent layers in a trainer run forward by the engine's kernels and backward by transformers' own operations.

A sequence's rows are packed, as in `exact_attention`: padding never reaches a state. Completions that share a prompt
begin from the state that it leaves, which is computed once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from myserve.engine.mixers.attention_pass import using
from myserve.engine.mixers.recurrent import StateRows, whole_sequences
from myserve.engine.mixers.recurrent_call import RecurrentCall
from myserve.engine.mixers.recurrent_functions import calls_functions, stand_before
from myserve.trainer.exact_attention import Spans, spans_of

__all__ = ["has_recurrent_layers", "make_recurrent_layers_exact"]


def has_recurrent_layers(model: nn.Module) -> bool:
    """Return whether some layers of a model call a function that our recurrences stand before.

    >>> has_recurrent_layers(nn.Linear(1, 1))
    False
    """
    return any(map(calls_functions, model.modules()))


def make_recurrent_layers_exact(model: nn.Module) -> None:
    """Let the recurrent layers of a trainer's model compute, in place, as the engine does, with gradients."""
    stand_before(model)
    modules: list[Any] = list(model.modules())
    for module in filter(calls_functions, modules):
        module.forward = _exactly(module.forward)


def _exactly(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        # a trainer's sequences are whole; with a cache, a layer would ask for states that nobody reads
        given |= {name: None for name in ("cache_params", "past_key_values") if name in given}
        spans = spans_of(given.get("kwargs", {}).get("spans"))
        with using(_TrainerLayer(given.get("attention_mask"), spans)):
            return forward(*bound.args, **bound.kwargs)

    return wrapped


class _TrainerLayer:
    """Mixes the rows of one layer (`attention_pass.Mode`)."""

    def __init__(self, mask: Tensor | None, spans: Spans | None) -> None:
        self._mask, self._spans = mask, spans

    def attend(self, *_: Any) -> Tensor:
        raise AssertionError("a trainer's attention has a name of its own")

    def mask(self, arguments: dict[str, Any]) -> Tensor | None:
        raise AssertionError("a trainer's attention has a name of its own")

    def mix(self, call: RecurrentCall) -> Tensor:
        """Return the mixed rows [B, T, ...]; zeros where there is padding."""
        batch, length = call.size
        real = torch.ones(batch, length, dtype=torch.bool) if self._mask is None else self._mask.bool()
        spans = self._spans or Spans.of_whole(real.sum(1).tolist())
        axis = call.function.axis
        packed = {name: call.arguments[name].movedim(axis, 1)[real] for name in call.function.rows}
        others = {
            name: value
            for name, value in call.arguments.items()
            if isinstance(value, Tensor) and name not in packed
        }
        names = (tuple(packed), tuple(others))
        mixed: Tensor = _ExactMixing.apply(call, spans, names, *packed.values(), *others.values())  # type: ignore[no-untyped-call]
        return mixed.new_zeros(batch, length, *mixed.shape[1:]).index_put((real,), mixed)


class _ExactMixing(torch.autograd.Function):
    """Mixes packed rows [T, ...] with weights."""

    @staticmethod
    def forward(
        ctx: Any,
        call: RecurrentCall,
        spans: Spans,
        names: tuple[tuple[str, ...], tuple[str, ...]],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.spans, ctx.names = call, spans, names
        rows = dict(zip(names[0], tensors, strict=False))
        others = dict(zip(names[1], tensors[len(names[0]) :], strict=True))
        return _mixed(call, spans, rows, call.arguments | others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        names: tuple[tuple[str, ...], tuple[str, ...]] = ctx.names
        # sums over the completions that share a prompt are float32, whatever the model is
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in ctx.saved_tensors]
        for context, parts in _gradients(ctx.call, ctx.spans, names, ctx.saved_tensors, grad):
            for number, part in enumerate(parts):
                if part is not None and number < len(names[0]):
                    grads[number].index_add_(0, context.flatten(), part.flatten(0, 1))
                elif part is not None:
                    grads[number] += part
        typed = (total.to(x.dtype) for total, x in zip(grads, ctx.saved_tensors, strict=True))
        return None, None, None, *typed


def _mixed(call: RecurrentCall, spans: Spans, rows: dict[str, Tensor], arguments: dict[str, Any]) -> Tensor:
    """Return what the kernel makes of packed rows: first of the spans that others go on from, then of these."""
    function, starts = call.function, spans.query_start.tolist()
    whole = [s for s, n in enumerate(spans.lengths) if n == len(spans.contexts[s])]
    if len(whole) == len(spans.lengths):
        return function.mixing(arguments | rows).compute(None, whole_sequences(spans.query_start.int()))
    slot_of = {starts[s]: slot for slot, s in enumerate(whole)}  # by the row that a context begins with
    states: Tensor | None = None
    parts: list[tuple[Tensor, Tensor]] = []
    for chosen in (whole, [s for s in range(len(spans.lengths)) if s not in set(whole)]):
        at = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in chosen])
        mixing = function.mixing(arguments | {name: x[at] for name, x in rows.items()})
        if states is None:
            states = mixing.state.allocate(len(whole))
        slots = torch.tensor([slot_of[int(spans.contexts[s][0])] for s in chosen], dtype=torch.int32)
        none = torch.full_like(slots, -1)
        parts.append(
            (at, mixing.compute(states, _rows(spans, chosen, slots, none, is_first=chosen is whole)))
        )
    order = torch.cat([at for at, _ in parts]).argsort()
    return torch.cat([mixed for _, mixed in parts])[order]


def _rows(spans: Spans, chosen: list[int], slots: Tensor, none: Tensor, *, is_first: bool) -> StateRows:
    lengths = torch.tensor([spans.lengths[s] for s in chosen])
    contexts = torch.tensor([len(spans.contexts[s]) for s in chosen], dtype=torch.int32)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return StateRows(starts, contexts, none, slots) if is_first else StateRows(starts, contexts, slots, none)


def _gradients(
    call: RecurrentCall,
    spans: Spans,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    tensors: tuple[Tensor, ...],
    grad: Tensor,
) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """For the spans of each shape: their contexts [B, K], and the gradients of their rows and of the weights."""
    count = len(names[0])
    for own, context in spans.by_shape:
        wanted = [x[context] for x in tensors[:count]] + list(tensors[count:])
        wanted = [x.detach().float().requires_grad_() for x in wanted]
        with torch.enable_grad():
            rows, others = (
                dict(zip(names[0], wanted, strict=False)),
                dict(zip(names[1], wanted[count:], strict=True)),
            )
            out = call.compute_theirs(rows, others)[:, -own.shape[1] :]
            found = torch.autograd.grad(out, wanted, grad[own].to(out.dtype), allow_unused=True)
        yield context, list(found)
