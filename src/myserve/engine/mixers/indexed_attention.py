"""Attention whose keys an index chooses is attention over all of them, in contexts that the index takes whole.

DeepSeek-V3.2 and what follows it (GLM-5, A.X K2, HY-V4) let an index choose `index_topk` keys for every query. Where no
more are there, it chooses all: then its scores decide nothing, and are not computed. Contexts end there, therefore
(`index_limit`); decision 0108 says why.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from myserve.errors import RequestError

__all__ = ["INDEXED", "index_limit", "select_all"]

INDEXED = "indexed_attention"  # as configs call such layers
_THEIRS = ("sdpa", "eager")  # attention that takes the index as a mask, and needs it


def index_limit(config: Any) -> int | None:
    """Return how many tokens of a context the index of a config takes whole; None where layers have none.

    >>> from transformers import AutoConfig
    >>> index_limit(AutoConfig.for_model("deepseek_v32", index_topk=2048)), index_limit(AutoConfig.for_model("llama"))
    (2048, None)
    """
    topk = getattr(config, "index_topk", None)
    return topk if isinstance(topk, int) and INDEXED in (getattr(config, "layer_types", None) or ()) else None


def select_all(model: nn.Module) -> int:
    """Let every index of a model choose all keys, from now on, under any attention but transformers' own.

    Returns how many there were. A trainer's context that is longer raises RequestError in the forward pass.

    >>> select_all(nn.Linear(1, 1))
    0
    """
    found: list[Any] = [module for module in model.modules() if _has_index(module)]
    for mixer in found:
        mixer.indexer.forward = MethodType(_selecting(mixer.indexer.forward), mixer.indexer)
        mixer.forward = MethodType(_with_a_mask(mixer.forward), mixer)
    return len(found)


def _has_index(mixer: Any) -> bool:
    indexer: Any = getattr(mixer, "indexer", None)
    return isinstance(getattr(indexer, "index_topk", None), int) and not hasattr(
        indexer.forward, "selects_all"
    )


def _selecting(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.config._attn_implementation in _THEIRS:
            return theirs(hidden_states, *args, **kwargs)
        if not torch.is_inference_mode_enabled():  # a trainer's; the engine's contexts end before
            _refuse_beyond(self.index_topk, args)
        # the chosen keys of each row, which our attention does not look at
        return torch.empty(*hidden_states.shape[:2], 0, dtype=torch.int32, device=hidden_states.device)

    forward.selects_all = True  # type: ignore[attr-defined]  # so that it is put there once
    return forward


def _refuse_beyond(topk: int, args: tuple[Any, ...]) -> None:
    """`args` of an index: what is left of the query, angles, mask, and positions [B, T] where its layer has them."""
    positions = args[3] if len(args) > 3 else None
    if positions is not None and int(positions.max()) >= topk:
        raise RequestError(
            f"position {int(positions.max())} is beyond the {topk} tokens that this model's index takes whole; "
            "longer contexts are not computed here"
        )


def _with_a_mask(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """An attention with an index takes slices of its mask, which ours does without."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        if kwargs.get("attention_mask") is None:
            batch, length = hidden_states.shape[:2]
            one = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=hidden_states.device)
            kwargs["attention_mask"] = one.expand(batch, 1, 1, length)
        return theirs(hidden_states, **kwargs)

    return forward
