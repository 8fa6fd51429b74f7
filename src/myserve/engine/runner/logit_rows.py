"""A model's head apart from its body, so that a long prompt's logits need never exist all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LogitRows:
    """The logits of a step's packed rows, made when they are looked at: `rows[a:b]` is [b - a, V].

    A row's logits are the bits that the whole step would have given it: the head's rows do not see each other
    (`exact`). The model's own code makes them, run on a body that repeats what it said, so that whatever stands
    between the last hidden state and the logits (soft caps, scales) is in them. (To multiply by the output
    embedding here was rejected: it would be right for most models.)
    """

    def __init__(self, model: Any, fixed_rows: int = 0) -> None:
        """`fixed_rows`: how many rows the head takes at once, where its bits depend on that; 0: any number."""
        self._model, self._fixed = model, fixed_rows
        self._said: list[Any] = []  # the body's outputs; last_hidden_state [1, T, D]
        self._start = 0

    def from_row(self, start: int) -> LogitRows:
        """The same, counted from another row."""
        rows = LogitRows(self._model, self._fixed)
        rows._said, rows._start = self._said, self._start + start
        return rows

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop = self._start + rows.start, self._start + rows.stop
        said: list[Tensor] = [output.last_hidden_state for output in self._said]
        hidden = (said[0] if len(said) == 1 else torch.cat(said, dim=1))[:, start:stop]
        if not self._fixed:
            return self._logits(hidden)
        count = stop - start
        hidden = F.pad(hidden, (0, 0, 0, -count % self._fixed))
        return torch.cat([self._logits(part) for part in torch.split(hidden, self._fixed, dim=1)])[:count]

    def _logits(self, hidden: Tensor) -> Tensor:  # [1, T, D] -> [T, V]
        name = self._model.base_model_prefix
        body = getattr(self._model, name)
        setattr(self._model, name, _CachedBody(type(self._said[0])(last_hidden_state=hidden)))
        try:
            nothing = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=nothing, use_cache=False).logits[0]
        finally:
            setattr(self._model, name, body)
        return logits


class _CachedBody(nn.Module):
    """A body that says what was said before."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


@contextmanager
def keep_rows(model: Any, fixed_rows: int = 0) -> Iterator[LogitRows]:
    """The rows of the forward passes that are run inside the block, in order; they may be looked at after it."""
    rows = LogitRows(model, fixed_rows)

    def keep(body: nn.Module, args: Any, output: Any) -> None:
        rows._said.append(output)

    handle = getattr(model, model.base_model_prefix).register_forward_hook(keep)
    try:
        yield rows
    finally:
        handle.remove()
