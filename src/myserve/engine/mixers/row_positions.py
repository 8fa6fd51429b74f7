"""A layer that counts its tokens from what its cache holds is told their positions: steps have no cache of that kind.

Llama 4 scales the queries of its layers without RoPE by their position, and takes that to be the row plus the number of
tokens that the cache has. In a step, rows of many requests follow each other and there is no such cache, and a trainer
may pad on the left. So a layer is given a cache whose length is, for each row, what is missing to its position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["tell_positions"]

_ASKS = {"attn_temperature_tuning", "get_seq_length"}  # what the code of an attention that counts so names
_TAKES = {"position_ids", "past_key_values"}


def tell_positions(model: nn.Module) -> int:
    """Tell, from now on, all layers of a model that count their tokens where these stand; return how many there are.

    >>> tell_positions(nn.Linear(1, 1))
    0
    """
    found: list[Any] = [(layer, mixer) for layer in model.modules() for mixer in _counting(layer)]
    for layer, mixer in found:
        layer.forward = MethodType(_telling(layer.forward), layer)
        mixer.forward = MethodType(_each_alone(mixer.forward), mixer)
    return len(found)


def _counting(layer: Any) -> Iterator[nn.Module]:
    """Yield the attention of a layer, where it counts and is not told yet."""
    for mixer in layer.children():
        code = getattr(inspect.unwrap(type(mixer).forward), "__code__", None)
        counts = code is not None and set(code.co_names) >= _ASKS
        if (
            counts
            and not hasattr(layer.forward, "tells")
            and inspect.signature(layer.forward).parameters.keys() >= _TAKES
        ):
            yield mixer


class _RowPositions:
    """Stands before a cache of transformers, or where there is none."""

    def __init__(self, positions: Tensor, cache: Any) -> None:  # [B, T]
        self.positions, self.cache = positions, cache

    @property
    def differ(self) -> bool:
        """True where sequences of one batch stand at other positions: some are padded on the left."""
        return len(self.positions) > 1 and bool((self.positions != self.positions[:1]).any())

    def get_seq_length(self, layer: int = 0) -> Tensor:
        """Return what each row [T] is short of its position."""
        return self.positions[0] - torch.arange(self.positions.shape[1], device=self.positions.device)

    def update(self, key: Tensor, value: Tensor, layer: int) -> Any:
        return (key, value) if self.cache is None else self.cache.update(key, value, layer)


def _telling(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["past_key_values"] = _RowPositions(positions, kwargs.get("past_key_values"))
        return theirs(hidden_states, **kwargs)

    forward.tells = True  # type: ignore[attr-defined]  # so that it is put there once
    return forward


def _each_alone(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """An attention has one scale for all sequences of a batch: where their positions differ, each is computed alone.

    A cache of them together is not filled then. Raises ValueError for one that holds something.
    """

    def forward(self: Any, **kwargs: Any) -> tuple[Tensor, None]:
        told = kwargs.get("past_key_values")
        if not isinstance(told, _RowPositions) or not told.differ:
            return theirs(**kwargs)  # type: ignore[no-any-return]
        if told.cache is not None and told.cache.get_seq_length() > 0:
            raise ValueError(
                "sequences padded on the left are computed whole, without what a cache holds of them"
            )
        alone = [
            theirs(
                **_one_of(kwargs, b, len(told.positions))
                | {"past_key_values": _RowPositions(positions[None], None)}
            )
            for b, positions in enumerate(told.positions)
        ]
        return torch.cat([out for out, _ in alone]), None

    return forward


def _one_of(kwargs: dict[str, Any], b: int, batch: int) -> dict[str, Any]:
    """Return the arguments of a call for one sequence of a batch."""
    return {
        name: _row(value, b) if isinstance(value, Tensor) and len(value) == batch else value
        for name, value in kwargs.items()
    }


def _row(value: Tensor, b: int) -> Tensor:
    row = value[b : b + 1]
    vars(row).update(vars(value))  # what a mask is marked with
    return row
