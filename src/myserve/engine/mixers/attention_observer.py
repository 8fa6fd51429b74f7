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

from myserve.engine.mixers.attention import dense_attention
from myserve.engine.mixers.attention_pass import AttentionCall, StateCall
from myserve.engine.mixers.recurrent import whole_sequences
from myserve.engine.mixers.recurrent_call import RecurrentCall
from myserve.errors import UnsupportedModelError

__all__ = ["AttentionObserver", "window_of_mask"]

# Positions of queries at which a mask is read: the last is beyond the windows of all models.
QUERIES = (3, 300, 5000, 1 << 20)
_WINDOW = "_myserve_window"  # the attribute of a mask that was read


class AttentionObserver:
    """Attends plainly, and keeps what each call was like (`attention_pass.Mode`)."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.calls: list[AttentionCall] = []
        self.states: list[StateCall] = []

    def mask(self, arguments: dict[str, Any]) -> Tensor | None:
        """Build a model's mask, marked with its window: None for what is no window, which a call of attention refuses.

        Some models build masks that no layer uses: Qwen2-MoE one of a window of 0, where it has none.
        """
        mask = sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None, "neither skip was allowed"
        setattr(mask, _WINDOW, window_of_mask(arguments["mask_function"]))
        return mask

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Keep the call, and attend without a cache. Raises UnsupportedModelError."""
        if mask is not None and not hasattr(mask, _WINDOW):
            raise self._refusal("gives its attention a mask of its own")
        if key.shape[0] != query.shape[0]:
            raise self._refusal("attends over other keys than those of its own tokens")
        window = options["window"] if mask is None else getattr(mask, _WINDOW)
        if window is None:
            raise self._refusal("hides other positions than those outside of one window")
        self.calls.append(
            AttentionCall(
                module,
                query.shape[1],
                key.shape[1],
                key.shape[2],
                value.shape[2],
                window,
                options["softcap"],
                options["sinks"] is not None,
            )
        )
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [heads, T, D]
        return dense_attention(query, key, value, **options | {"window": window}).transpose(0, 1)

    def mix(self, call: RecurrentCall) -> Tensor:
        """Keep a call of a recurrent function, and mix its rows [1, T, ...] from the beginning."""
        mixing = call.packed(lambda x: x[0])
        self.states.append(StateCall(call.name, mixing.state))
        count = call.size[1]
        return mixing.compute(None, whole_sequences(torch.tensor([0, count], dtype=torch.int32)))[None]

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._model_name} {why}, and the engine's attention knows windows alone; serve another model"
        )


def window_of_mask(function: Any) -> int | None:
    """Return the window of a mask function of transformers: 0 for a plain causal one, None for any other.

    >>> from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
    >>> window_of_mask(causal_mask_function), window_of_mask(sliding_window_causal_mask_function(4096))
    (0, 4096)
    """
    seen = []
    for query in QUERIES:
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
        seen.append(count)
    window = 0 if seen[-1] == QUERIES[-1] + 1 else seen[-1]
    expected = [query + 1 if not window else min(query + 1, window) for query in QUERIES]
    return window if seen == expected else None
