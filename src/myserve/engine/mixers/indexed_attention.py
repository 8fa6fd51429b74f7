"""Attention whose keys an index chooses is attention over all of them, in contexts that the index takes whole.

DeepSeek-V3.2 and what follows it (GLM-5, A.X K2, HY-V4) let an index choose `index_topk` keys for every query, MiniMax
M3 `index_topk_blocks` blocks of keys. Where no more are there, it chooses all: then its scores decide nothing, and are
not computed. Contexts end there, therefore (`index_limit`); decision 0108 says why.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from myserve.errors import RequestError

__all__ = ["INDEXED", "index_limit", "select_all"]

_KEYS, _BLOCKS = "indexed_attention", "minimax_m3_sparse"
INDEXED = frozenset((_KEYS, _BLOCKS))  # as configs call such layers
_THEIRS = ("sdpa", "eager")  # attention that takes the index as a mask, and needs it


def index_limit(config: Any) -> int | None:
    """Return how many tokens of a context the index of a config takes whole; None where layers have none.

    >>> from transformers import AutoConfig
    >>> index_limit(AutoConfig.for_model("deepseek_v32", index_topk=2048)), index_limit(AutoConfig.for_model("llama"))
    (2048, None)
    """
    layers, topk = getattr(config, "layer_types", None) or (), getattr(config, "index_topk", None)
    if _BLOCKS in layers:
        return int(config.index_topk_blocks * config.index_block_size)
    return topk if isinstance(topk, int) and _KEYS in layers else None


def select_all(model: nn.Module) -> int:
    """Let every index of a model choose all keys, from now on, under any attention but transformers' own.

    Returns how many there were. A trainer's context that is longer raises RequestError in the forward pass.

    >>> select_all(nn.Linear(1, 1))
    0
    """
    found: list[Any] = [module for module in model.modules() if _has_index(module)]
    for mixer in found:
        mixer.indexer.forward = MethodType(_selecting(mixer.indexer.forward), mixer.indexer)
        if not _chooses_blocks(mixer.indexer):
            mixer.forward = MethodType(_with_a_mask(mixer.forward), mixer)
    return len(found)


def _has_index(mixer: Any) -> bool:
    indexer: Any = getattr(mixer, "indexer", None)
    is_one = isinstance(getattr(indexer, "index_topk", None), int) or _chooses_blocks(indexer)
    return is_one and not hasattr(indexer.forward, "selects_all")


def _chooses_blocks(indexer: Any) -> bool:
    return isinstance(getattr(indexer, "topk_blocks", None), int)


def _selecting(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.config._attn_implementation in _THEIRS:
            return theirs(hidden_states, *args, **kwargs)
        if not torch.is_inference_mode_enabled():  # a trainer's; the engine's contexts end before
            whole = self.topk_blocks * self.block_size if _chooses_blocks(self) else self.index_topk
            _refuse_beyond(whole, args)
        # the chosen keys of each row, which our attention does not look at
        return torch.empty(*hidden_states.shape[:2], 0, dtype=torch.int32, device=hidden_states.device)

    forward.selects_all = True  # type: ignore[attr-defined]  # so that it is put there once
    return forward


def _refuse_beyond(whole: int, args: tuple[Any, ...]) -> None:
    """`args` of an index: tensors and caches, and at last the positions [B, T] where its layer has them."""
    positions = args[-1] if args else None
    if isinstance(positions, Tensor) and not positions.is_floating_point() and int(positions.max()) >= whole:
        raise RequestError(
            f"position {int(positions.max())} is beyond the {whole} tokens that this model's index takes whole; "
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
