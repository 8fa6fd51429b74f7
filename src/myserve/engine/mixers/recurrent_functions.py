"""Recurrent layers are ours: we stand before the functions that transformers' files name for them.

A file of transformers has its convolution and its recurrence as functions of its own (`causal_conv1d_fn`,
`torch_chunk_gated_delta_rule`), which its layers call by name, so that faster ones can be put there. Ours answer while
a mode of this thread asks them to (`attention_pass.using`), and hand on to theirs otherwise. The rest of a layer, its
projections, gates and norms, stays transformers'. A layer is always called without a cache: then it calls the same
function for one token and for many.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from myserve.engine.mixers.attention_pass import current_mode
from myserve.engine.mixers.lightning_attention import is_lightning_attention, stand_in_the_layers
from myserve.engine.mixers.recurrent import Convolution, Mixing, Recurrence, SelectiveScan
from myserve.engine.mixers.recurrent_call import Arguments, RecurrentCall, RecurrentFunction

__all__ = ["FUNCTIONS", "calls_functions", "stand_before"]


def _convolution(a: Arguments) -> Mixing:
    name = a.get("activation")
    if name not in (None, "silu", "swish"):
        raise ValueError(f"a convolution with {name} behind it is not computed here")
    weight, x = a["weight"], a["hidden_states"]
    # theirs has its rows in the weights' type first, where it takes such a pair
    if x.dtype != weight.dtype and weight.dtype != torch.float32:
        raise ValueError(f"a convolution of {x.dtype} by weights of {weight.dtype} is not computed here")
    return Convolution(x, weight, a.get("bias"), name is not None)


def _delta_rule(a: Arguments) -> Mixing:
    return Recurrence(
        a["query"],
        a["key"],
        a["value"],
        a["g"].float(),
        a["beta"].float(),
        scale=a["query"].shape[-1] ** -0.5,
        is_delta=True,
        is_normed=bool(a.get("use_qk_l2norm_in_kernel")),
    )


def _scan(a: Arguments) -> Mixing:
    """Mamba-2: keys are B, queries are C, and a token's step in time is how much of it the state takes in."""
    dt = a["dt"]
    if a.get("dt_bias") is not None:
        dt = dt + a["dt_bias"].to(dt.dtype)
    if a.get("dt_softplus"):
        dt = F.softplus(dt)
    dt = torch.clamp(dt, *a.get("dt_limit", (0.0, float("inf")))).float()
    return Recurrence(
        a["C"],
        a["B"],
        a["hidden_states"],
        a["A"].float() * dt,
        dt,
        scale=1.0,
        is_delta=False,
        skip=None if a.get("D") is None else a["D"].float(),
        out_is_wide=True,
    )


def _selective_scan(a: Arguments) -> Mixing:
    """Mamba-1: keys are B, queries are C, and every channel has a step in time of its own."""
    missing = [name for name in ("D", "z", "delta_bias") if a.get(name) is None]
    if missing or not a.get("delta_softplus"):
        without = ", ".join(missing) or "delta_softplus"
        raise ValueError(f"a selective scan without {without} is not computed here")
    return SelectiveScan(
        a["hidden_states"], a["dt"], a["z"], a["B"], a["C"], a["A"].float(), a["delta_bias"].float(), a["D"].float()
    )  # fmt: skip


def _with_state(mixed: Tensor) -> tuple[Tensor, None]:
    return mixed, None


def _itself(mixed: Tensor) -> Tensor:
    return mixed


_DELTA = RecurrentFunction(("query", "key", "value", "g", "beta"), 1, _delta_rule, _with_state)
FUNCTIONS: dict[str, RecurrentFunction] = {
    "causal_conv1d_fn": RecurrentFunction(("hidden_states",), 2, _convolution, _itself),
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "mamba_selective_scan": RecurrentFunction(
        ("hidden_states", "dt", "B", "C", "z"), 2, _selective_scan, _itself
    ),
    "mamba2_chunk_scan": RecurrentFunction(("hidden_states", "dt", "B", "C"), 1, _scan, _itself),
}


def calls_functions(module: nn.Module) -> bool:
    """Return whether a module's forward names one of `FUNCTIONS`, or has been made to call such a function.

    >>> calls_functions(nn.Conv1d(1, 1, 1))
    False
    """
    if is_lightning_attention(module):
        return True
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not FUNCTIONS.keys().isdisjoint(code.co_names)


def stand_before(model: nn.Module) -> None:
    """Put ours before the functions of the files that the model's classes come from.

    They are globals of a file of transformers, and ours stand there for the whole process: outside of a mode, other
    models find what was there. Before a model's modules get other forwards, for one class gets one here.
    """
    stand_in_the_layers(model)
    for name in {type(module).__module__ for module in model.modules()}:
        file = sys.modules[name]
        for function in FUNCTIONS:
            theirs = getattr(file, function, None)
            if theirs is not None and not hasattr(theirs, "stands_before"):
                setattr(file, function, _before(function, theirs))


def _before(name: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
    signature, function = inspect.signature(theirs), FUNCTIONS[name]

    @functools.wraps(theirs)
    def ours(*args: Any, **kwargs: Any) -> Any:
        mode = current_mode()
        if mode is None:
            return theirs(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        arguments = {key: value for key, value in bound.arguments.items() if key != "kwargs"}
        call = RecurrentCall(name, function, arguments, theirs)
        return call.unpacked(mode.mix(call))

    ours.stands_before = theirs  # type: ignore[attr-defined]  # so that it is put there once
    return ours
