"""A step recorded once and replayed without Python: what CUDA graphs are to a GPU, for a CPU.

A step of n requests makes the same kernel calls every time, on the same memory if we give it the same memory. The
model's own forward runs once under a dispatch mode that writes down every call of a kernel of ours and every tensor
operation. Replaying, a run of kernel calls is one call into compiled code; what is not ours is called again as the
tensor operation that it was, and its result copied to where it was.

Rejected: writing the forward pass of the common models ourselves. This serves any model and changes no bit of it.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from myserve.engine.kernels.launch import KernelScratch, recording
from myserve.engine.steps.launches import Operation, Taken, TensorPlace, parts, storage, without_dead_calls
from myserve.engine.steps.tensor_operations import launch_instead, launch_like

__all__ = ["PAGE", "InterruptedRecordingError", "NotRecordableError", "Pool", "Recorder", "Recording"]

PAGE = 4096  # bytes
MOST_KEPT = 16 << 10  # bytes of a result that follows from weights alone
TOUCHED_AT_ONCE = 4 << 20  # bytes: some 4 ms on a virtual machine, for which a request may wait

_aten = torch.ops.aten
# What a recording cannot hold: a result that Python has looked at, or whose shape the data decides.
_LOOKS_AT_DATA = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default}


class NotRecordableError(Exception):
    """Raised where a step depends on its data in another way than through tensors."""


class InterruptedRecordingError(Exception):
    """Recording ahead was dropped, for there is something to compute."""


class Pool:
    """Allocate the tensors of recordings from memory that is kept: what one tensor leaves, the next takes.

    Recordings of one pool share it, for only one is replayed at a time; so the largest decides how much there is. A
    tensor that outlives its recording, for a module keeps it, keeps its memory.
    """

    def __init__(self) -> None:
        self.scratch = KernelScratch()
        self._blocks: list[Tensor] = []
        self._used: dict[int, int] = {}  # bytes of the block at an address that some tensor has had
        self._touched: dict[int, int] = {}  # of these, touched
        self._free: dict[int, list[int]] = defaultdict(list)  # size, a power of two -> addresses
        # of every block, in order: where it begins and ends; None: there are new ones
        self._bounds: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None

    def prefault(self) -> bool:
        """Touch a few MiB more, which the system gives page by page; False when all that is used was touched."""
        for block in self._blocks:
            address = _aligned(block)
            begin = self._touched.get(address, 0)
            if begin < self._used[address]:
                end = min(begin + TOUCHED_AT_ONCE, self._used[address])
                first = address - block.data_ptr()
                block[first + begin : first + end : PAGE] = 0
                self._touched[address] = end
                return True
        return False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor that begins at a cache line (64 bytes)."""
        count = math.prod(shape)
        size = 1 << max(6, (count * dtype.itemsize - 1).bit_length())
        if not self._free[size]:
            block = torch.empty(size + 64, dtype=torch.uint8)
            self._blocks.append(block)
            self._used[_aligned(block)] = 0
            self._bounds = None
            self._free[size].append(_aligned(block))
        address = self._free[size].pop()
        self._used[address] = max(self._used[address], count * dtype.itemsize)
        # PyTorch does not tell when a storage dies; but a storage made from a buffer holds the buffer.
        buffer = (ctypes.c_char * size).from_address(address)
        weakref.finalize(buffer, self._free[size].append, address)
        return torch.frombuffer(buffer, dtype=dtype, count=max(count, 1))[:count].view(shape)

    def copy_of(self, x: Tensor) -> Tensor:
        """Return a tensor of the values and strides of `x` from this memory. Raises NotRecordableError."""
        if x.device.type != "cpu" or x.layout != torch.strided:
            raise NotRecordableError(f"a result lies on {x.device}, {x.layout}")
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        place = self.empty((span if x.numel() else 0,), x.dtype)
        return place.as_strided(x.shape, x.stride()).copy_(x)

    def has(self, address: int) -> bool:
        """Return whether a tensor of this memory begins at an address."""
        return address in self._used

    def places_of(self, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> set[int]:
        """Return where the blocks begin that some of these numbers point into."""
        if self._bounds is None:
            blocks = sorted((_aligned(block), block.numel() - 64) for block in self._blocks)
            begins = np.array([begin for begin, _ in blocks], np.int64)
            self._bounds = begins, begins + np.array([size for _, size in blocks], np.int64)
        begins, ends = self._bounds
        index = np.searchsorted(begins, numbers, side="right") - 1
        inside = (index >= 0) & (numbers < ends[index]) if len(begins) else np.zeros(len(numbers), bool)
        return set(begins[index[inside]].tolist())


def _aligned(block: Tensor) -> int:
    """Return the address of the block's first whole cache line; it is 64 bytes larger than what it offers."""
    return block.data_ptr() + -block.data_ptr() % 64


class _RecordingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is untyped
    """Run a forward pass and add each tensor operation that is not a kernel's call to the list of calls."""

    def __init__(
        self, calls: list[Any], pool: Pool, is_over: Callable[[], bool], weights: Iterable[Tensor]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.pool, self.is_over = calls, pool, is_over
        # by storage: weights, and what was computed of them alone, which has to live as long as the recording
        self.constants = {storage(weight): weight for weight in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_over():
            raise InterruptedRecordingError
        if func is _aten.empty.memory_format:
            return self._taken(
                self.pool.empty(tuple(args[0]), kwargs.get("dtype") or torch.get_default_dtype())
            )
        if func in _LOOKS_AT_DATA:
            raise NotRecordableError(str(func))
        if self._follows_from_weights(func, args, kwargs) and self._is_kept(out := func(*args, **kwargs)):
            return out
        with self:
            ours = launch_instead(func, args, kwargs)
        if ours is not None:
            return ours
        out = func(*args, **kwargs)
        operation = Operation.of(func, args, kwargs, out)
        if operation.does_nothing:
            return out
        if operation.places == [0] and isinstance(out, Tensor):
            with self:
                ours = launch_like(func, args, kwargs, out)
            if ours is not None:
                return ours
        out = operation.move_into(self.pool, out)
        self.calls += [*map(Taken, operation.writes()), operation]
        return out

    def _taken(self, x: Tensor) -> Tensor:
        self.calls.append(Taken(storage(x)))
        return x

    def _follows_from_weights(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether an operation's result does: then it is computed once, when it is recorded."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = [storage(x) in self.constants for x in given]
        if func._schema.is_mutable:
            if known[:1] == [True]:
                raise NotRecordableError(f"{func} changes what the weights give")
            return False
        return bool(given) and all(known)

    def _is_kept(self, out: Any) -> bool:
        """Keep what was made of weights, unless it is large: every recording has its own."""
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(storage(x) not in self.constants and x.nbytes > MOST_KEPT for x in made):
            return False
        self.constants.update({storage(x): x for x in made})
        return True


class Recording:
    """Record one forward pass; replay it on whatever its input tensors then hold.

    >>> x = torch.ones(2, 3)
    >>> step = Recording(lambda: (x + x) * 3, Pool())
    >>> x.fill_(5.0).sum(), step.replay()[0, 0]
    (tensor(30.), tensor(30.))
    """

    def __init__(
        self,
        forward: Callable[[], Tensor],
        pool: Pool,
        *,
        runs: bool = True,
        is_over: Callable[[], bool] = lambda: False,
        weights: Iterable[Tensor] = (),
    ) -> None:
        """`weights`: what is the same in every replay, and what is computed of it alone.

        Without `runs` no kernel is run: `out` has no meaning before the first replay, and nothing was computed.

        Raises NotRecordableError, and InterruptedRecordingError as soon as `is_over` returns True.
        """
        with (
            recording(pool.scratch, runs=runs) as calls,
            _RecordingMode(calls, pool, is_over, weights) as mode,
        ):
            out = forward()
        self._pool, self._constants = pool, mode.constants
        self._parts = parts(without_dead_calls(calls, out, pool))
        self.out = TensorPlace(out).tensor() if pool.has(storage(out)) else out

    def replay(self) -> Tensor:
        """Compute the step again; the result lies in the same memory every time."""
        for part in self._parts:
            part()
        return self.out


class Recorder:
    """Make the recordings of one model; all of them share one memory.

    They hold what its parameters are when they are made: with new values, new recordings.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pool, self._model = Pool(), model

    def __call__(self, forward: Callable[[], Tensor]) -> Recording:
        """Run `forward` and record it. Raises NotRecordableError."""
        return Recording(forward, self.pool, weights=self._model.parameters())

    def ahead(self, forward: Callable[[], Tensor], is_over: Callable[[], bool]) -> Recording:
        """Record `forward` without its kernels' work: what Python does, and none of what a step costs.

        Raises NotRecordableError, and InterruptedRecordingError as soon as `is_over` returns True.
        """
        return Recording(forward, self.pool, runs=False, is_over=is_over, weights=self._model.parameters())

    def prefault(self) -> bool:
        """Touch some of the memory that recordings use for the first time; False when all of it was touched."""
        return self.pool.prefault()
