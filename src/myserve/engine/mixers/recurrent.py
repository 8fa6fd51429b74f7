"""Convolutions and recurrences in one fixed order, for prefill and decode alike: the door to kernels on raw memory.

As in `attention`, every tensor is compared here with what a kernel will read and write of it. What does not fit raises
ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from myserve.engine.kernels.launch import this_thread, threads_for
from myserve.engine.kernels.recurrent import convolution, recurrence, selective_scan

__all__ = [
    "Convolution", "Mixing", "Recurrence", "SelectiveScan", "StateRows", "StateShape", "whole_sequences",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class StateRows:
    """Hold where the packed rows of a step find their requests' states, and where they leave them.

    Request r owns the rows query_start[r] .. query_start[r + 1], the last of its context. One whose context has no
    other rows begins with zeros. Rows behind the last request's are padding rows, and come out as zeros.
    """

    query_start: Tensor  # [R + 1] int32
    context_lens: Tensor  # [R] int32: rows of each request so far, its new ones included
    read: Tensor  # [R] int32: the slot of the state after the rows before these
    write: Tensor  # [R] int32: the slot for the state after these, no request's `read`; -1: it is not kept


def whole_sequences(query_start: Tensor) -> StateRows:
    """Return rows of sequences that begin here, and whose states are not kept."""
    none = torch.full((len(query_start) - 1,), -1, dtype=torch.int32)
    return StateRows(query_start, query_start.diff().int(), none, none)


@dataclass(frozen=True, slots=True)
class StateShape:
    """The state of one request in one call of a convolution or a recurrence."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """
        >>> StateShape((2, 8), torch.bfloat16).num_bytes
        32
        """
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def allocate(self, slots: int) -> Tensor:
        """Return the states of so many slots, zeroed."""
        return torch.zeros(slots, *self.shape, dtype=self.dtype)


class Mixing(Protocol):
    """A convolution or a recurrence, with the packed rows that it is asked to mix."""

    @property
    def state(self) -> StateShape: ...

    def compute(self, states: Tensor | None, rows: StateRows) -> Tensor:
        """Return the mixed rows [T, ...]. `states`: of all slots; None where none is read or kept."""
        ...


@dataclass(frozen=True, slots=True)
class Convolution:
    """A causal convolution of each channel, with SiLU behind it or not.

    It is computed in the weights' type, in which its state is kept, and comes out in that of its rows: some bfloat16
    models keep these weights in float32.

    >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
    >>> two = Convolution(rows, torch.tensor([[10.0, 1.0]]), None, is_silu=False)
    >>> two.compute(None, whole_sequences(torch.tensor([0, 3], dtype=torch.int32))).flatten()
    tensor([ 1., 12., 23.])
    """

    x: Tensor  # [T, C]
    weight: Tensor  # [C, taps]
    bias: Tensor | None  # [C], of the weights' type
    is_silu: bool

    @property
    def state(self) -> StateShape:
        return StateShape((self.weight.shape[1] - 1, self.weight.shape[0]), self.weight.dtype)

    def compute(self, states: Tensor | None, rows: StateRows) -> Tensor:
        """Return the convolved rows [T, C]."""
        x = self.x.to(self.weight.dtype)
        x = x if x.stride(1) == 1 else x.contiguous()
        (count, channels), size = x.shape, x.element_size()
        bias = None if self.bias is None else self.bias.contiguous()
        weight, dtype = self.weight.contiguous(), x.dtype
        _check("x", x, dtype, (count, channels))
        _check("weight", weight, dtype, (channels, weight.shape[1]))
        if bias is not None:
            _check("bias", bias, dtype, (channels,))
        _check_states(states, self.state, rows)
        out = torch.empty(count, channels, dtype=dtype)
        threads = threads_for(count * channels * weight.shape[1])
        per_thread = _cache_lines(convolution.scratch_bytes(weight.shape[1]))
        convolution.convolution_kernel(dtype)(
            threads,
            x=x.data_ptr(), x_row=size * x.stride(0), weight=weight.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(), out=out.data_ptr(), **_places(states, rows),
            rows=count, channels=channels, taps=weight.shape[1], is_silu=self.is_silu,
            scratch=this_thread().scratch(per_thread * threads), scratch_thread=per_thread,
        )  # fmt: skip
        return out.to(self.x.dtype)


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A linear recurrence: each value head has a state [K, V], which decays, takes in a token and is read.

    `is_delta`: what the state says of a key already is taken off its value first (the delta rule).
    `is_normed`: queries and keys are divided by their length.
    """

    query: Tensor  # [T, Hk, K]
    key: Tensor  # [T, Hk, K]
    value: Tensor  # [T, H, V]
    decay: Tensor  # [T, H] or [T, H, K] float32: logarithms, none above 0
    beta: Tensor  # [T, H] float32
    scale: float  # of queries
    is_delta: bool
    is_normed: bool = False
    skip: Tensor | None = None  # [H] float32: how much of a value goes past the state
    out_is_wide: bool = False  # float32, whatever the values are
    eps: float = 1e-6

    @property
    def state(self) -> StateShape:
        columns = recurrence.tile_columns(self.value.shape[2])
        tiles = -(-self.value.shape[2] // columns)
        return StateShape((self.value.shape[1], tiles, self.key.shape[2], columns), torch.float32)

    def compute(self, states: Tensor | None, rows: StateRows) -> Tensor:
        """Return what the queries read [T, H, V]."""
        query, key, value = (
            x if x.stride(2) == 1 else x.contiguous() for x in (self.query, self.key, self.value)
        )
        decay, beta = self.decay.contiguous(), self.beta.contiguous()
        (count, heads, width), dtype, size = value.shape, value.dtype, value.element_size()
        key_heads, dim = key.shape[1:]
        if heads % key_heads:
            raise ValueError(f"{heads} heads of values do not share {key_heads} heads of keys")
        _check("query", query, dtype, (count, key_heads, dim))
        _check("key", key, dtype, (count, key_heads, dim))
        _check("decay", decay, torch.float32, (count, heads, *decay.shape[2:]))
        decays = decay.shape[2] if decay.dim() == 3 else 1
        if decays not in (1, dim):
            raise ValueError(f"decays {tuple(decay.shape)} are neither one nor {dim} for each head")
        _check("beta", beta, torch.float32, (count, heads))
        if self.skip is not None:
            _check("skip", self.skip, torch.float32, (heads,))
        _check_states(states, self.state, rows)
        out = torch.empty(count, heads, width, dtype=torch.float32 if self.out_is_wide else dtype)
        tiles, _, columns = self.state.shape[1:]
        threads = threads_for(count * heads * dim * width)
        per_thread = _cache_lines(recurrence.scratch_bytes(dim, columns))
        recurrence.recurrence_kernel(dtype)(
            threads,
            query=query.data_ptr(), query_row=size * query.stride(0), query_head=size * query.stride(1),
            key=key.data_ptr(), key_row=size * key.stride(0), key_head=size * key.stride(1),
            value=value.data_ptr(), value_row=size * value.stride(0), value_head=size * value.stride(1),
            decay=decay.data_ptr(), decay_row=4 * heads * decays, decay_head=4 * decays, decays=decays,
            beta=beta.data_ptr(), beta_row=4 * heads, skip=0 if self.skip is None else self.skip.data_ptr(),
            out=out.data_ptr(), out_is_wide=self.out_is_wide, **_places(states, rows),
            rows=count, heads=heads, key_heads=key_heads, key_dim=dim, value_dim=width, columns=columns, tiles=tiles,
            is_delta=self.is_delta, is_normed=self.is_normed, scale=self.scale, eps=self.eps,
            scratch=this_thread().scratch(per_thread * threads), scratch_thread=per_thread,
        )  # fmt: skip
        return out


@dataclass(frozen=True, slots=True)
class SelectiveScan:
    """Mamba-1's scan: each channel has a state [S], which decays by the channel's own step in time and is gated.

    >>> one = torch.ones(1, 1)
    >>> scan = SelectiveScan(2 * one, one, one, one, one, -one, torch.zeros(1), torch.zeros(1))
    >>> scan.compute(None, whole_sequences(torch.tensor([0, 1], dtype=torch.int32)))  # 2 softplus(1) silu(1)
    tensor([[1.9201]])
    """

    x: Tensor  # [T, C]
    step: Tensor  # [T, C]: softplus(step + bias) is a token's step in time
    gate: Tensor  # [T, C]: what is read is multiplied by silu(gate)
    key: Tensor  # [T, S]
    query: Tensor  # [T, S]
    rate: Tensor  # [C, S] float32: of decay, none above 0
    bias: Tensor  # [C] float32, of steps
    skip: Tensor  # [C] float32: how much of x goes past the state

    @property
    def state(self) -> StateShape:
        tiles = -(-self.x.shape[1] // selective_scan.CHANNELS)
        return StateShape((tiles, self.rate.shape[1], selective_scan.CHANNELS), torch.float32)

    def compute(self, states: Tensor | None, rows: StateRows) -> Tensor:
        """Return what the queries read, gated [T, C]."""
        (count, channels), size, dtype = self.x.shape, self.rate.shape[1], self.x.dtype
        wide = {"x": self.x, "step": self.step, "gate": self.gate}
        places: dict[str, int] = {}
        # what is copied has to live until the kernel has run
        held: list[Tensor] = []
        for name, x in (wide | {"key": self.key, "query": self.query}).items():
            x = x if x.stride(1) == 1 else x.contiguous()
            _check(name, x, dtype, (count, channels if name in wide else size))
            places |= {name: x.data_ptr(), f"{name}_row": x.element_size() * x.stride(0)}
            held.append(x)
        for name, x in (("rate", self.rate), ("bias", self.bias), ("skip", self.skip)):
            x = x.contiguous()
            _check(name, x, torch.float32, (channels, size) if name == "rate" else (channels,))
            places[name] = x.data_ptr()
            held.append(x)
        _check_states(states, self.state, rows)
        out = torch.empty(count, channels, dtype=dtype)
        # an exponential each, and what stands around it
        threads = threads_for(8 * count * channels * size)
        per_thread = _cache_lines(selective_scan.scratch_bytes(size))
        selective_scan.selective_scan_kernel(dtype)(
            threads, **places, out=out.data_ptr(), **_places(states, rows), rows=count, channels=channels, size=size,
            scratch=this_thread().scratch(per_thread * threads), scratch_thread=per_thread,
        )  # fmt: skip
        return out


def _places(states: Tensor | None, rows: StateRows) -> dict[str, int]:
    return {
        "states": 0 if states is None else states.data_ptr(),
        "read": rows.read.data_ptr(),
        "write": rows.write.data_ptr(),
        "starts": rows.query_start.data_ptr(),
        "lens": rows.context_lens.data_ptr(),
        "requests": len(rows.context_lens),
    }


def _cache_lines(count: int) -> int:
    return -(-count // 64) * 64


def _check_states(states: Tensor | None, state: StateShape, rows: StateRows) -> None:
    requests = len(rows.context_lens)
    for name, ints, length in (
        ("query_start", rows.query_start, requests + 1),
        ("context_lens", rows.context_lens, requests),
        ("read", rows.read, requests),
        ("write", rows.write, requests),
    ):
        if not ints.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
        _check(name, ints, torch.int32, (length,))
    if states is not None:
        _check("states", states, state.dtype, (states.shape[0], *state.shape))
        if not states.is_contiguous():
            raise ValueError("states must be contiguous")


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless x lies on the CPU, is of this type, bfloat16 or float32 (or int32), and this shape."""
    if x.device.type != "cpu" or x.dtype != dtype or tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, not {dtype} {tuple(shape)} on cpu"
        )
    if dtype not in (torch.bfloat16, torch.float32, torch.int32):
        raise ValueError(f"{name} is {dtype}; the kernels compute in bfloat16 and float32")
    if x.dim() and x.numel() and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")
