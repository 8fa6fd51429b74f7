"""A model's calls of attention and recurrence, seen by running it once: shapes and windows are read off them, not its
config.

A config's `head_dim` is not the width of the values of DeepSeek-V3, nor of every layer of Gemma 4; and where a layer's
window stands in the mask alone (Qwen2-MoE), no argument names it. So the masks of the model are read, too: each is a
function of two positions, and is asked about positions far beyond any window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from myserve.engine.mixers.attention import Reach, dense_attention
from myserve.engine.mixers.attention_pass import AttentionCall, StateCall
from myserve.engine.mixers.recurrent import whole_sequences
from myserve.engine.mixers.recurrent_call import RecurrentCall
from myserve.errors import UnsupportedModelError

__all__ = ["AttentionObserver", "reach_of_mask"]

# Positions of queries at which a mask is read: the last is beyond the windows of all models.
QUERIES = (3, 300, 5000, 1 << 20)
_REACH = "_myserve_reach"  # the attribute of a mask that was read


class AttentionObserver:
    """Attends plainly, and keeps what each call was like (`attention_pass.Mode`)."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.calls: list[AttentionCall] = []
        self.states: list[StateCall] = []

    def mask(self, arguments: dict[str, Any]) -> Tensor | None:
        """Build a model's mask, marked with its reach: None for what is no window and no chunk.

        A call of attention refuses that, and not this, for some models build masks that no layer uses: Qwen2-MoE one of
        a window of 0, where it has none.
        """
        mask = sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None, "neither skip was allowed"
        setattr(mask, _REACH, reach_of_mask(arguments["mask_function"]))
        return mask

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Keep the call, and attend without a cache. Raises UnsupportedModelError."""
        if mask is not None and not hasattr(mask, _REACH):
            raise self._refusal("gives its attention a mask of its own")
        if key.shape[0] != query.shape[0]:
            raise self._refusal("attends over other keys than those of its own tokens")
        reach = Reach(options["window"]) if mask is None else getattr(mask, _REACH)
        if reach is None:
            raise self._refusal("hides other positions than those outside of one window or chunk")
        self.calls.append(
            AttentionCall(
                module,
                query.shape[1],
                key.shape[1],
                key.shape[2],
                value.shape[2],
                reach.window,
                options["softcap"],
                options["sinks"] is not None,
                reach.chunk,
            )
        )
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [heads, T, D]
        return dense_attention(query, key, value, **options | reach._asdict()).transpose(0, 1)

    def mix(self, call: RecurrentCall) -> Tensor:
        """Keep a call of a recurrent function, and mix its rows [1, T, ...] from the beginning."""
        mixing = call.packed(lambda x: x[0])
        self.states.append(StateCall(call.name, mixing.state))
        count = call.size[1]
        return mixing.compute(None, whole_sequences(torch.tensor([0, count], dtype=torch.int32)))[None]

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._model_name} {why}, and the engine's attention knows windows and chunks alone; serve another model"
        )


def reach_of_mask(function: Any) -> Reach | None:
    """Return how far back a mask function of transformers lets queries see; None for what is no window and no chunk.

    >>> from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function
    >>> reach_of_mask(causal_mask_function)
    Reach(window=0, chunk=0)
    >>> reach_of_mask(chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.int64)))
    Reach(window=0, chunk=8192)
    """
    last = _first_seen(function, QUERIES[-1])
    if last is None:
        return None
    if last == 0:
        reach = Reach()
    else:
        # Behind a query whose chunk begins at `last` a chunk ends; before it lies a whole one. A window just moves on.
        before = _first_seen(function, last - 1)
        if before is None:
            return None
        is_chunk = _first_seen(function, last) == last
        width = last - before if is_chunk else QUERIES[-1] + 1 - last
        reach = Reach(chunk=width) if is_chunk and width > 1 else Reach(window=width)
    # beside the usual ones, those at both ends of the last chunk, where a chunk and a window differ most
    asked = {*QUERIES, last, max(0, last - 1)}
    return reach if all(_first_seen(function, query) == _first_of(reach, query) for query in asked) else None


def _first_of(reach: Reach, query: int) -> int:
    """Return the first position that a query sees by `reach`."""
    first = max(0, query + 1 - reach.window) if reach.window else 0
    return max(first, query // reach.chunk * reach.chunk) if reach.chunk else first


def _first_seen(function: Any, query: int) -> int | None:
    """Return the first position that a query sees by a mask function; None where it does not see all from there on."""
    positions = torch.arange(query + 2)
    zero = torch.tensor(0)
    try:
        visible = function(zero, zero, torch.tensor(query), positions)
    except IndexError:  # it looks positions up in a table, as masks of padding do
        return None
    visible = torch.as_tensor(visible).expand(query + 2)
    count = int(visible.sum())
    if count == 0 or not visible[query + 1 - count : query + 1].all():
        return None
    return query + 1 - count
