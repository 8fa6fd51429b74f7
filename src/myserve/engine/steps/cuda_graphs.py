"""Steps recorded as CUDA graphs: what `replay` is to a CPU. Only calls of PyTorch's documented interface.

Recordings share one pool of memory, for one is replayed at a time and each reads nothing that another wrote; and their
logits come out in one place, for a place each would cost a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from myserve.engine.steps.recorder import NotRecordableError

__all__ = ["WARM_UPS", "GraphRecording", "Graphs"]

WARM_UPS = 3  # libraries choose and allocate in their first calls, which a capture must not see


class Graphs:
    """Makes recordings. `cuda`: torch.cuda, or what acts like it in a test."""

    ahead = None  # a capture runs its warm-ups

    def __init__(self, device: torch.device, most_logits: int, cuda: Any = torch.cuda) -> None:
        self._device, self._most, self._cuda = device, most_logits, cuda
        self._pool, self._aside = cuda.graph_pool_handle(), cuda.Stream(device)
        self._logits: Tensor | None = None  # [most_logits, V], of all recordings

    def __call__(self, forward: Callable[[], Tensor]) -> GraphRecording:
        """Runs `forward` several times. Raises NotRecordableError where it asks the device for something."""
        try:
            with self._cuda.device(self._device):
                return self._record(forward)
        except RuntimeError as error:  # torch.AcceleratorError too
            raise NotRecordableError(str(error).splitlines()[0]) from error

    def prefault(self) -> bool:
        """False: the memory of captures is the graphs' own."""
        return False

    def _record(self, forward: Callable[[], Tensor]) -> GraphRecording:
        cuda, aside = self._cuda, self._aside
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):
            for _ in range(WARM_UPS):
                logits = forward()
        cuda.current_stream().wait_stream(aside)
        if self._logits is None:
            self._logits = logits.new_empty(self._most, logits.shape[1])
        out = self._logits[: len(logits)]
        graph = cuda.CUDAGraph()
        # another thread may be preparing weights, and allocate: no business of this capture's
        with cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            out.copy_(forward())
        graph.replay()  # a capture computes nothing
        return GraphRecording(graph, out)


class GraphRecording:
    """One forward pass, to be made again on whatever its input tensors then hold (`recorded_steps.Recorded`)."""

    def __init__(self, graph: Any, out: Tensor) -> None:
        self._graph, self.out = graph, out

    def replay(self) -> Tensor:
        """The result, in memory that the next replay of any writes."""
        self._graph.replay()
        return self.out
