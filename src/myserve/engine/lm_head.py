"""A model's head apart from its body, so that a long prompt's logits need never exist all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LogitRows:
    """The logits of a step's packed rows, made when they are looked at: `rows[a:b]` is [b - a, V].

    A row's logits are the bits that the whole step would have given it: the head's rows do not see each other
    (`exact`). The model's own code makes them, run on a body that repeats what it said, so that whatever stands
    between the last hidden state and the logits (soft caps, scales) is in them. (To multiply by the output
    embedding here was rejected: it would be right for most models.)
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._said: Any = None  # the body's output; last_hidden_state [1, T, D]
        self._start = 0

    def from_row(self, start: int) -> LogitRows:
        """The same, counted from another row."""
        rows = LogitRows(self._model)
        rows._said, rows._start = self._said, self._start + start
        return rows

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop = self._start + rows.start, self._start + rows.stop
        hidden: Tensor = self._said.last_hidden_state[:, start:stop]
        name = self._model.base_model_prefix
        body = getattr(self._model, name)
        setattr(self._model, name, _Repeats(type(self._said)(last_hidden_state=hidden)))
        try:
            nothing = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=nothing, use_cache=False).logits[0]
        finally:
            setattr(self._model, name, body)
        return logits


class _Repeats(nn.Module):
    """A body that says what was said before."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


@contextmanager
def keep_rows(model: Any) -> Iterator[LogitRows]:
    """The rows of the forward pass that is run inside the block; they may be looked at after it."""
    rows = LogitRows(model)

    def keep(body: nn.Module, args: Any, output: Any) -> None:
        rows._said = output

    handle = getattr(model, model.base_model_prefix).register_forward_hook(keep)
    try:
        yield rows
    finally:
        handle.remove()
