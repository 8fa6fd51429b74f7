"""The structure of a loaded model, seen by running it once: its calls of attention and recurrence, and its head.

A model that cannot be run so is refused here, in one sentence, whatever its own code raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from myserve.engine.mixers.attention_observer import AttentionObserver
from myserve.engine.mixers.attention_pass import AttentionCall, StateCall, using
from myserve.engine.mixers.indexed_attention import select_all
from myserve.engine.mixers.recurrent_functions import stand_before
from myserve.engine.mixers.row_positions import tell_positions
from myserve.engine.runner.logit_rows import LogitRows, body_outputs
from myserve.engine.scheduling.step_costs import AttentionCost
from myserve.errors import MyserveError, UnsupportedModelError

__all__ = ["ModelStructure", "observe"]

TOKENS = 4
WANTED = (1, 3)  # rows whose logits are asked for
SLOWER_PRODUCTS = 1.3  # seconds of attention's products by those of a linear layer, measured on AVX-512
SAME_ROWS = 0.999  # correlation of a row's logits, by the head alone and by the whole model


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """Hold what steps need to know of a model beside its weights."""

    calls: tuple[AttentionCall, ...]  # of attention in one forward pass, in their order
    body: str  # path of the module whose last hidden state the head takes
    states: tuple[StateCall, ...] = ()  # calls of recurrent functions, in their order

    @property
    def longest_window(self) -> int:
        """The largest over all calls, chunks among them; 0 where none has one."""
        return max((call.window or call.chunk for call in self.calls), default=0)

    def attention_costs(self, num_weights: int) -> tuple[AttentionCost, ...]:
        """Return what reading a key costs beside a token's products with `num_weights`, by layers of equal window."""
        multiplied: Counter[int] = Counter()
        for call in self.calls:
            multiplied[call.window or call.chunk] += call.heads * (call.key_dim + call.value_dim)
        return tuple(
            AttentionCost(window, SLOWER_PRODUCTS * count / num_weights)
            for window, count in multiplied.items()
        )


@torch.inference_mode()
def observe(model: Any) -> ModelStructure:
    """Run `model`, whose attention is ours, on a few tokens, and return what it does.

    Raises UnsupportedModelError, naming the model and the reason, for one whose steps could not be batched.
    """
    name = type(model).__name__
    observer = AttentionObserver(name)
    stand_before(model)
    tell_positions(model)
    select_all(model)
    ids = torch.arange(TOKENS, device=model.device)[None]
    wanted = torch.tensor(WANTED, device=model.device)
    try:
        with using(observer), body_outputs(model) as outputs:
            logits = model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=wanted).logits[0]
    except MyserveError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be run with the engine's attention and products ({type(error).__name__}: "
            f"{_first_line(error)}); serve another model, or report this one"
        ) from error
    if not observer.calls and not observer.states:
        raise UnsupportedModelError(
            f"{name} does not take its attention from transformers' AttentionInterface, so its requests cannot be "
            "batched; models of the Llama, Qwen, Mistral, Gemma, GPT-2, OLMo and MoE kinds do"
        )
    if logits.shape[0] != len(WANTED):
        raise UnsupportedModelError(
            f"{name} gives {logits.shape[0]} rows of logits where {len(WANTED)} are asked for"
        )
    return ModelStructure(tuple(observer.calls), _body(model, outputs, logits), tuple(observer.states))


def _body(model: Any, outputs: dict[str, Any], logits: Tensor) -> str:
    """The path of the body, proved: by the head alone come the same `logits` [wanted, V]."""
    name = type(model).__name__
    for path, output in reversed(outputs.items()):
        rows = LogitRows(model, path)
        rows.add(output)
        try:
            made = rows[0:TOKENS][list(WANTED)]
        except Exception:  # it is not what the head takes
            continue
        if made.shape == logits.shape and _is_close(made, logits):
            return path
    raise UnsupportedModelError(
        f"{name} has no body whose last hidden state its head takes, so prompts could not be scored"
    )


def _is_close(a: Tensor, b: Tensor) -> bool:  # [rows, V] each
    return min(correlations(a, b)) > SAME_ROWS


def correlations(a: Tensor, b: Tensor) -> Sequence[float]:
    """Return, for each row of two [T, V], the correlation of their logits; equal rows have 1, constant ones too."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    norms = (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-30)
    found = torch.where((a == b).all(-1), 1.0, (a * b).sum(-1) / norms)
    return [float(value) for value in found]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else "no reason given"
