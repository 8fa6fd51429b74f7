"""A trainer's batch computes a shared prompt once, and logits only where completion tokens were drawn.

Padded, each sample brings its prompt again and has logits at every place. Eight answers of three tokens to a prompt of
twenty are 184 rows so, and 36 here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from myserve.errors import RequestError, UnsupportedModelError
from myserve.trainer.exact_attention import TRAINER_NAME, Spans, sharing
from myserve.trainer.exact_recurrence import has_recurrent_layers
from myserve.trainer.replay_routing import replay_routing

if TYPE_CHECKING:
    import numpy as np

    Routing = Tensor | np.ndarray[Any, Any]

__all__ = ["completion_logits"]


def completion_logits(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    routing: Sequence[Routing] | None = None,
) -> Tensor:
    """Return the logits that every completion token was drawn from, sample after sample: [sum of C, V], with gradients.

    `model` is an `exact_forward` model; `prompts` and `completions` are token ids, a prompt of P > 0 tokens for each
    completion of C. Equal prompts are computed once, forward and backward. Every row has the bits that the engine had
    when it drew the token: `exact_logprobs` turns them into the server's own numbers. `routing`, for a mixture of
    experts: each sample's expert ids [P + C, L, k] (or without the last row), as `aligned_routing` gives them and
    `replay_routing` takes them.

    Raises `RequestError` for a model that `exact_forward` has not made exact, for prompts, completions or routing whose
    lengths do not fit, and for routing under gradient checkpointing; `UnsupportedModelError` for a model that keeps a
    state of another kind than `exact_forward` computes.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> from myserve import exact_forward
    >>> size = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = exact_forward(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **size)))
    >>> completion_logits(model, [[1, 2], [1, 2], [3]], [[5, 6], [5], [7, 7, 7]]).shape
    torch.Size([6, 8])
    """
    _check(model, prompts, completions, routing)
    layout = _Layout.of(prompts, completions, routing)
    experts = _packed_routing(layout, routing)
    kept = torch.tensor(sorted(set(layout.drawn_from)))
    # Transformers' models hand what they do not know on to attention.
    call: Any = model
    spans = layout.spans()
    with sharing(spans), nullcontext() if experts is None else replay_routing(model, experts):
        logits: Tensor = call(
            input_ids=torch.tensor([layout.token_ids]),
            position_ids=torch.tensor([layout.position_ids]),
            use_cache=False,
            logits_to_keep=kept,
            spans=spans,
        ).logits[0]  # [rows that a token was drawn from, V]
    if spans.was_dropped and _is_checkpointed(model):
        # backward would run the layers again without them
        raise UnsupportedModelError(
            f"{type(model).__name__} hands no keywords down to its layers, so its prompts cannot be shared under "
            "gradient checkpointing; turn that off"
        )
    return logits.index_select(0, torch.searchsorted(kept, torch.tensor(layout.drawn_from)))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Packed rows: each distinct prompt, then its completions but for their last tokens, from which none is drawn."""

    token_ids: list[int]  # [T]
    position_ids: list[int]  # [T]
    sources: list[tuple[int, int]]  # [T]: the sample that a row is of, and the place in it
    lengths: list[int]  # [S]: rows of each span
    contexts: list[list[range]]  # [S]: the rows that each span sees
    drawn_from: list[int]  # [sum of C]: the row before each completion token, in the order of the samples

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        routing: Sequence[Routing] | None,
    ) -> _Layout:
        packed = cls([], [], [], [], [], [])
        groups: defaultdict[Hashable, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            if len(completions[i]):
                groups[_identity(prompt, None if routing is None else routing[i])].append(i)
        drawn_from: dict[int, list[int]] = {}
        for members in groups.values():
            prompt = prompts[members[0]]
            prompt_rows = packed._add(members[0], 0, prompt, [])
            for i in members:
                own = packed._add(i, len(prompt), completions[i][:-1], [prompt_rows])
                drawn_from[i] = [prompt_rows[-1], *own]
        packed.drawn_from.extend(row for i in sorted(drawn_from) for row in drawn_from[i])
        return packed

    def _add(self, sample: int, start: int, tokens: Sequence[int], before: list[range]) -> range:
        """Add a span of a sample's tokens from place `start` on, and return its rows."""
        rows = range(len(self.token_ids), len(self.token_ids) + len(tokens))
        if rows:
            places = range(start, start + len(tokens))
            self.token_ids.extend(tokens)
            self.position_ids.extend(places)
            self.sources.extend((sample, place) for place in places)
            self.lengths.append(len(rows))
            self.contexts.append([*before, rows])
        return rows

    def spans(self) -> Spans:
        contexts = [
            torch.cat([torch.arange(part.start, part.stop) for part in parts]) for parts in self.contexts
        ]
        return Spans(self.lengths, contexts)


def _identity(prompt: Sequence[int], routing: Routing | None) -> Hashable:
    """Return a key that is equal for prompts that may share rows: equal tokens and, where given, equal experts."""
    if routing is None:
        return tuple(prompt)
    return tuple(prompt), torch.as_tensor(routing[: len(prompt)]).numpy().tobytes()


def _packed_routing(layout: _Layout, routing: Sequence[Routing] | None) -> Tensor | None:
    """Return the routing of each packed row, [T, L, k]."""
    if routing is None:
        return None
    rows = [torch.as_tensor(routing[sample][place]) for sample, place in layout.sources]
    return torch.stack(rows)


def _check(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    routing: Sequence[Routing] | None,
) -> None:
    if model.config._attn_implementation != TRAINER_NAME:
        raise RequestError("completion_logits takes a model that exact_forward has made exact", param="model")
    if getattr(model, "_is_stateful", False) and not has_recurrent_layers(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps a state between tokens: its prompts cannot be shared"
        )
    if len(prompts) != len(completions) or (routing is not None and len(routing) != len(prompts)):
        raise RequestError("each completion needs a prompt, and routing where any has it", param="prompts")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise RequestError(f"prompt {i} is empty: nothing comes before its completion", param="prompts")
        if routing is not None and len(routing[i]) < len(prompt) + len(completions[i]) - 1:
            raise RequestError(
                f"routing {i} has {len(routing[i])} rows for {len(prompt)} + {len(completions[i])} tokens",
                param="routing",
            )
    if not any(map(len, completions)):
        raise RequestError("there are no completion tokens", param="completions")
    if routing is not None and _is_checkpointed(model):
        # Backward runs the forward again, outside of the replay: other experts, without a word.
        raise RequestError(
            "with gradient checkpointing the replay must last until backward: use replay_routing",
            param="routing",
        )


def _is_checkpointed(model: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
