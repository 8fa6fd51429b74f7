"""The tensors that blocks and slots stand for: keys and values of every layer, and states of recurrent ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from myserve.core.transfer import upload
from myserve.engine.config import NUM_SEQS_AT_ANY_PACE, EngineConfig
from myserve.engine.memory import huge_pages
from myserve.engine.memory.device import free_memory
from myserve.engine.memory.prefault import HUGE_PAGE
from myserve.engine.mixers.recurrent import StateShape
from myserve.engine.runner.device_backend import DeviceBackend, LayerShape

__all__ = ["SLOTS_A_REQUEST", "KVCache"]

MOST_BYTES_UNASKED = 4 << 30
AHEAD = 2048  # tokens, for whose blocks memory lies ready
# eight requests' at once: two that a step needs, and the two that the prefix cache keeps of each
SLOTS_AHEAD = 32
STATES_SHARE = 0.5  # of the cache's memory, what states may take
SLOTS_A_REQUEST = 2  # one that a step reads, and one that it writes
KEPT_SLOTS = 32  # for the prefix cache, where requests take all others; two serve a prompt and its answer


class KVCache:
    """`num_blocks` blocks of `block_size` tokens in every layer.

    A system hands memory out when it is first written, so a cache that is larger than its use costs nothing. But who
    is the first to write there waits for it: a prompt a tenth of its time, and eight streams that step on new states
    together five times a step's. `make_ready` does so before.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        longest: int,
        dtype: torch.dtype,
        backend: DeviceBackend,
        config: EngineConfig,
        states: Sequence[StateShape] = (),
    ) -> None:
        """`shapes`: of the keys and values of each call of attention. `longest`: positions the model was made for.

        `states`: of each call of a recurrent function.
        """
        self.device, self.block_size, self.pages = backend.device, backend.block_size, backend.pages
        size = sum(backend.bytes_per_block(shape, dtype) for shape in shapes)
        self.num_state_slots = _affordable_slots(states, backend, config)
        self.states = [
            huge_pages.zeros((self.num_state_slots, *state.shape), state.dtype) for state in states
        ]
        of_states = self.num_state_slots * sum(state.num_bytes for state in states)
        self.num_blocks = config.num_blocks or _affordable_blocks(size, longest, backend, config, of_states)
        self.layers: list[tuple[Tensor, Tensor]] = [
            backend.allocate_layer(self.num_blocks, shape, dtype) for shape in shapes
        ]
        self.num_bytes = self.num_blocks * size
        # blocks of a model that never attends have no memory
        tensors = [tensor for layer in self.layers for tensor in layer]
        self._ready = _Ready(tensors, AHEAD // self.block_size)
        self._ready_states = _Ready(self.states, SLOTS_AHEAD)

    def make_ready(self, blocks_used: int, slots_used: int = 0) -> bool:
        """Have the system hand out a page or so, for what is behind the first ones, which were used already.

        False where all lies ready.
        """
        if self.device.type != "cpu":
            return False
        return self._ready.touch(blocks_used) or self._ready_states.touch(slots_used)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, in every layer: (from, to)."""
        if not pairs:
            return
        sources, targets = (upload(side, torch.int64, self.device) for side in zip(*pairs, strict=True))
        for keys, values in self.layers:
            keys[targets] = keys[sources]
            values[targets] = values[sources]


class _Ready:
    """The first rows of some tensors, whose memory lies ready: always some more than were used."""

    def __init__(self, tensors: Sequence[Tensor], ahead: int) -> None:
        self._ahead = ahead
        self._num_rows = tensors[0].shape[0] if tensors else 0
        self._num_ready = 0
        self._touching = self._touch_pages(tensors)

    def touch(self, num_used: int) -> bool:
        """Touch a page or so; False where `ahead` rows behind the first `num_used` lie ready."""
        if self._num_ready >= min(self._num_rows, num_used + self._ahead):
            return False
        next(self._touching, None)
        return True

    def _touch_pages(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """A tensor at a time, as many rows as lie in a huge page."""
        at_once = max(1, HUGE_PAGE // tensors[0][0].nbytes)
        for first in range(0, self._num_rows, at_once):
            for tensor in tensors:
                huge_pages.touch(tensor[first : first + at_once])
                yield
            self._num_ready = first + at_once


def _affordable_slots(states: Sequence[StateShape], backend: DeviceBackend, config: EngineConfig) -> int:
    """As many as requests side by side and the prefix cache need, or half of the memory pays for; two at least."""
    size = sum(state.num_bytes for state in states)
    if not size:
        return 0
    budget = config.kv_cache_bytes or int(config.kv_cache_share * free_memory(backend.device))
    if not config.kv_cache_bytes:
        budget = min(budget, 2 * MOST_BYTES_UNASKED)
    most = SLOTS_A_REQUEST * config.most_seqs + (KEPT_SLOTS if config.prefix_caching else 0)
    return max(SLOTS_A_REQUEST, min(int(STATES_SHARE * budget) // size, most))


def _affordable_blocks(
    size: int, longest: int, backend: DeviceBackend, config: EngineConfig, of_states: int = 0
) -> int:
    """As many blocks as the budget pays for, states taken off; never more than the requests that surely run could use.

    A prefix cache fills whatever it is given in time. So on a CPU, whose memory others use too, it is given
    `MOST_BYTES_UNASKED` at most, unless somebody asked for more or one request alone may need more.
    """
    context = -(-(config.max_model_len or longest) // backend.block_size)
    most = (config.max_num_seqs or NUM_SEQS_AT_ANY_PACE) * context
    if not size:
        return most
    if config.kv_cache_bytes:
        affordable = (config.kv_cache_bytes - of_states) // size
    else:
        affordable = (int(config.kv_cache_share * free_memory(backend.device)) - of_states) // size
        if backend.device.type == "cpu":
            affordable = min(affordable, max(context, MOST_BYTES_UNASKED // size))
    return max(1, min(affordable, most))
