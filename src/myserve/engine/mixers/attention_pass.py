"""A forward pass of transformers' own model whose attention is ours: each call of attention has a cache of its own, and
each call of a recurrent function states of its own (`recurrent_functions`).

A model takes its attention from transformers' `AttentionInterface` under our name. The step that is run stands in a
variable of the thread, since some models do not hand keywords down to their layers:

    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    with attending(context, calls):
        model(input_ids, position_ids=position_ids, use_cache=False)

`calls` are those that the model was observed to make at load (`attention_observer`). The cache goes by the call, not by
the layer: DiffLlama attends twice in a layer, and HRM runs its layers several times.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from myserve.engine.mixers import attention
from myserve.engine.mixers.attention import PagedContext
from myserve.engine.mixers.recurrent import StateShape
from myserve.engine.mixers.recurrent_call import RecurrentCall

__all__ = [
    "ATTENTION_NAME", "AttentionCall", "Mode", "StateCall", "attending", "current_mode",
    "register_attention", "using",
]  # fmt: skip

ATTENTION_NAME = "myserve_paged"  # a model's `attn_implementation`


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention in a model's forward pass, as it was observed."""

    module: torch.nn.Module  # that calls
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int  # positions that a query sees, its own included; 0: all
    softcap: float = 0.0
    sinks: bool = False
    chunk: int = 0  # positions of the chunks that a context is cut into, each seeing itself; 0: it is not cut


@dataclass(frozen=True, slots=True)
class StateCall:
    """One call of a convolution or a recurrence in a model's forward pass, as it was observed."""

    name: str  # of the function of transformers that was called
    state: StateShape  # what it keeps of each request


class Mode(Protocol):
    """Answer calls of attention and of recurrent functions while a model runs: by a step's pages and states, or by the
    observer at load.
    """

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor: ...  # fmt: skip

    def mask(self, arguments: dict[str, Any]) -> Tensor | None: ...
    def mix(self, call: RecurrentCall) -> Tensor:
        """Return what a recurrent function mixes, [B, T, ...]."""
        ...


class _Current(threading.local):
    mode: Mode | None = None


_current = _Current()


def current_mode() -> Mode | None:
    """Return what answers the models that this thread runs now."""
    return _current.mode


@contextmanager
def using(mode: Mode) -> Iterator[None]:
    """Let the models that this thread runs meanwhile attend by `mode`."""
    before, _current.mode = _current.mode, mode
    try:
        yield
    finally:
        _current.mode = before


@contextmanager
def attending(
    context: PagedContext, calls: Sequence[AttentionCall], states: Sequence[StateCall] = ()
) -> Iterator[None]:
    """Let one forward pass store and attend in the pages of `context`, its calls being `calls` in their order.

    `states`: its calls of recurrent functions, in theirs.

    Raises RuntimeError where the pass makes other calls than it was observed to make.
    """
    if len(calls) != len(context.layers):
        raise RuntimeError(f"{len(calls)} calls of attention have {len(context.layers)} caches")
    if len(states) != len(context.states):
        raise RuntimeError(f"{len(states)} recurrent calls have the states of {len(context.states)}")
    step = _PagedPass(context, calls, states)
    with using(step):
        yield
    if step.done != len(calls):
        raise RuntimeError(
            f"the model made {step.done} calls of attention, and {len(calls)} when it was observed"
        )
    if step.mixed != len(states):
        raise RuntimeError(
            f"the model made {step.mixed} recurrent calls, and {len(states)} when it was observed"
        )


class _PagedPass:
    """One forward pass over the pages of one step."""

    def __init__(
        self, context: PagedContext, calls: Sequence[AttentionCall], states: Sequence[StateCall]
    ) -> None:
        self.context, self.calls, self.states = context, calls, states
        self.done = self.mixed = 0

    def mask(self, arguments: dict[str, Any]) -> Tensor | None:
        """No mask is built: what each call may see was read off the model's masks when it was observed."""
        return None

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Store this call's keys and values [T, Hkv, D] and attend; query [T, H, Dk]. Gives [T, H, Dv]."""
        call, (key_cache, value_cache) = (
            self._next(module, query, key, value),
            self.context.layers[self.done - 1],
        )
        context, seen = self.context, {"window": call.window, "chunk": call.chunk}
        options |= seen | {"value_dim": call.value_dim}
        if context.pages is not None:
            context.pages.store(key, value, key_cache, value_cache, context.slot_mapping)
            return context.pages.attend(query, key_cache, value_cache, context, **options)
        attention.store_kv(key, value, key_cache, value_cache, context.slot_mapping)
        tables, starts, lens = context.block_tables, context.query_start, context.context_lens
        return attention.paged_attention(query, key_cache, value_cache, tables, starts, lens, **options)

    def mix(self, call: RecurrentCall) -> Tensor:
        """Mix the step's rows [1, T, ...] from the states of their requests, and leave new ones."""
        mixing, rows = call.packed(lambda x: x[0]), self.context.state_rows
        if self.mixed == len(self.states) or rows is None:
            raise RuntimeError(f"{call.name} is called more often than it was observed to be")
        observed, states = self.states[self.mixed], self.context.states[self.mixed]
        self.mixed += 1
        if observed != StateCall(call.name, mixing.state):
            raise RuntimeError(f"{call.name} keeps {mixing.state}, which it was not observed to do")
        return mixing.compute(states, rows)[None]

    def _next(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
        if self.done == len(self.calls):
            raise RuntimeError(f"{type(module).__name__} attends more often than it was observed to")
        call = self.calls[self.done]
        self.done += 1
        shape = (query.shape[1], key.shape[1], key.shape[2], value.shape[2])
        if module is not call.module or shape != (call.heads, call.kv_heads, call.key_dim, call.value_dim):
            raise RuntimeError(
                f"{type(module).__name__} attends with {shape}, which it was not observed to do"
            )
        return call


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks for it: query [1, H, T, D], key and value [1, Hkv, T, D]; gives [1, T, H, D]."""
    if _current.mode is None:
        raise RuntimeError("a model with the engine's attention runs inside of `attending` alone")
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": sliding_window or 0,
        "chunk": 0,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    out = _current.mode.attend(module, query, key, value, attention_mask, options)
    # as transformers' own attentions give it: some models (AFMoE) flatten it by `view`
    return out.contiguous()[None], None


def _mask(**arguments: Any) -> Tensor | None:
    return None if _current.mode is None else _current.mode.mask(arguments)


def register_attention() -> None:
    """Make `attn_implementation="myserve_paged"` known to transformers."""
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
