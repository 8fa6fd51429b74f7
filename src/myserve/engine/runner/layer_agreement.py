"""Layers are compared one by one, each on the inputs that it has in the model's own forward, and what attends in them.

In half precision a model may be so sensitive that two right ways to compute it have other logits: a rounding in one
layer is a larger one in each behind it, most of all where experts are chosen by it. On its own inputs a layer shows its
own error alone. Rows meet in attention and in recurrences and nowhere else: there a wrong mask, position or state is.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from myserve.engine.scheduling.batch import Batch

__all__ = ["Forward", "correlation", "layers_agree"]

log = logging.getLogger(__name__)

# Correlation of what a layer changes of its rows, over all steps: of the tiny MiniMax in bfloat16 0.999, where experts
# are chosen otherwise at a tie in some of them.
AGREEMENT = 0.95
# And of what a module that attends or has a state gives, in any one step: no expert is chosen in it. There 0.9999;
# 0.997 and less where its states decay faster by half.
AGREEMENT_MIXED = 0.998

Forward = Callable[[Batch, list[int]], Tensor]


def layers_agree(
    model: nn.Module,
    mixers: Collection[nn.Module],
    prompts: Sequence[list[int]],
    own: Callable[[list[int]], object],
    steps: Callable[[Callable[[Forward], Forward]], object],
) -> bool:
    """Return whether each layer does to its rows in steps what it does in the model's own forward, but for rounding.

    `mixers`: the modules that attend or have a state.
    `own(prompt)` runs the model's own forward; `steps(forced)` runs steps of these prompts by `forced(forward)`, of a
    `forward` of packed rows without padding.
    """
    layers = _OwnLayers(model, mixers)
    try:
        for prompt in prompts:
            with layers.kept(prompt):
                own(prompt)
        steps(layers.forced)
    except Exception:  # layers that take and give something else
        log.debug("layers of %s cannot be compared", type(model).__name__, exc_info=True)
        return False
    changed, mixed = layers.agreement()
    log.debug("layers of %s agree by %.4f, what mixes rows by %.4f", type(model).__name__, changed, mixed)
    return changed > AGREEMENT and mixed > AGREEMENT_MIXED


@dataclass
class _Own:
    """Hold what ran in a model's own forward of a prompt, in its order."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # given and gave, [T, ...] each
    mixed: list[Tensor] = field(default_factory=list)  # [T, ...]


class _OwnLayers:
    """Hold what each layer of a model is given and gives in its own forward, for some prompts; and in steps of them."""

    def __init__(self, model: nn.Module, mixers: Collection[nn.Module]) -> None:
        self._layers, self._mixers = list(_outermost_layers(model)), list(mixers)
        self._own: dict[tuple[int, ...], _Own] = {}
        # of a call of a layer: what it changed of rows in a step, and by itself
        self._changes: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._mixed: list[float] = []  # correlations, of each call in each step

    @contextmanager
    def kept(self, prompt: Sequence[int]) -> Iterator[None]:
        """Keep what the layers do with a prompt that is run inside."""
        own = self._own[tuple(prompt)] = _Own()

        def layer(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            own.layers.append((_hidden(args, kwargs)[0].clone(), _first(out)[0].clone()))

        def mixer(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            own.mixed.append(_first(out)[0].clone())

        with _hooks(self._layers, layer), _hooks(self._mixers, mixer):
            yield

    def forced(self, forward: Forward) -> Forward:
        """Return `forward` in which each layer, and the head, is given the rows that it has in the own forward."""

        def run(batch: Batch, wanted: list[int]) -> Tensor:
            step = self._joined(batch)
            layers, mixed = iter(step.layers), iter(step.mixed)
            running: list[tuple[Tensor, Tensor]] = []

            def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                running.append(next(layers))
                hidden = _with_rows(_hidden(args, kwargs), running[-1][0])
                return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

            def take(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
                (given, gave), ours = running[-1], _first(out)
                change = ours[0, : len(gave)].float() - given.float()
                self._changes[len(running)].append((change, gave.float() - given.float()))
                forced = _with_rows(ours, gave)
                return (forced, *out[1:]) if isinstance(out, tuple) else forced

            def compare(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
                own = next(mixed)
                self._mixed.append(correlation(_first(out)[0, : len(own)], own))

            with _hooks(self._layers, take, before=give), _hooks(self._mixers, compare):
                logits = forward(batch, wanted)
            if [*layers, *mixed]:
                raise ValueError("a step calls fewer layers than the own forward")
            return logits

        return run

    def agreement(self) -> tuple[float, float]:
        """Return the least correlation of what a layer changed in steps with what it changes by itself, and of what
        mixed rows in a step; 0 of none.
        """
        joined = ([torch.cat(each) for each in zip(*rows, strict=True)] for rows in self._changes.values())
        changed = min((correlation(ours, own) for ours, own in joined), default=0.0)
        return changed, min(self._mixed, default=0.0)

    def _joined(self, batch: Batch) -> _Own:
        """Return what the own forwards have of a batch's rows."""
        parts = [
            (self._own[tuple(part.request.prompt_token_ids)], slice(part.start, part.start + part.count))
            for part in batch.scheduled
        ]
        pairs = zip(*(own.layers for own, _ in parts), strict=True)
        mixed = zip(*(own.mixed for own, _ in parts), strict=True)
        rows = [rows for _, rows in parts]
        return _Own(
            [
                (_cut([given for given, _ in each], rows), _cut([gave for _, gave in each], rows))
                for each in pairs
            ],
            [_cut(each, rows) for each in mixed],
        )


def _cut(parts: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    return torch.cat([part[here] for part, here in zip(parts, rows, strict=True)])


@contextmanager
def _hooks(modules: Sequence[nn.Module], after: Any, before: Any = None) -> Iterator[None]:
    handles = [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    if before is not None:
        handles += [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outermost_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield transformers' layers that are in no other one."""
    for child in model.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost_layers(child)


def _hidden(args: Any, kwargs: dict[str, Any]) -> Tensor:  # [1, T, ...]
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _first(out: Any) -> Tensor:
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _with_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Put rows [T, ...] in place of the first of [1, T or more, ...]."""
    return torch.cat([rows[None].to(hidden.dtype), hidden[:, len(rows) :]], dim=1)


def correlation(a: Tensor, b: Tensor) -> float:  # [T, V] each
    """Correlate all of a sequence's rows, each about its own mean.

    >>> correlation(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 9.0]]))
    1.0
    """
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))
