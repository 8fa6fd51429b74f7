"""A model's head apart from its body, so that a long prompt's logits need never exist all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LogitRows", "body_outputs", "keep_rows"]


class LogitRows:
    """The logits of a step's packed rows, made when they are looked at: `rows[a:b]` is [b - a, V].

    A row's logits are the bits that the whole step would have given it: the head's rows do not see each other. The
    model's own code makes them, run on a body that repeats its output, so that whatever stands between the last hidden
    state and the logits (soft caps, scales) is in them. (To multiply by the output embedding here was rejected: it
    would be right for most models.)
    """

    def __init__(self, model: Any, body: str, fixed_rows: int = 0) -> None:
        """`body`: the path of the module that the head follows (`model_structure.ModelStructure.body`).

        `fixed_rows`: how many rows the head takes at once, where its bits depend on that; 0: any number.
        """
        self._model, self._body, self._fixed = model, body, fixed_rows
        self._outputs: list[Any] = []  # of the body; last_hidden_state [1, T, D]
        self._start = 0

    def add(self, output: Any) -> None:
        """Append the rows of one output of the body."""
        self._outputs.append(output)

    def from_row(self, start: int) -> LogitRows:
        """Return the same rows, counted from another one."""
        rows = LogitRows(self._model, self._body, self._fixed)
        rows._outputs, rows._start = self._outputs, self._start + start
        return rows

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop = self._start + rows.start, self._start + rows.stop
        states: list[Tensor] = [output.last_hidden_state for output in self._outputs]
        hidden = (states[0] if len(states) == 1 else torch.cat(states, dim=1))[:, start:stop]
        if not self._fixed:
            return self._logits(hidden)
        count = stop - start
        hidden = F.pad(hidden, (0, 0, 0, -count % self._fixed))
        return torch.cat([self._logits(part) for part in torch.split(hidden, self._fixed, dim=1)])[:count]

    def _logits(self, hidden: Tensor) -> Tensor:  # [1, T, D] -> [T, V]
        parent_path, _, name = self._body.rpartition(".")
        parent = self._model.get_submodule(parent_path)
        body = getattr(parent, name)
        setattr(parent, name, _CachedBody(type(self._outputs[0])(last_hidden_state=hidden), body))
        try:
            nothing = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=nothing, use_cache=False).logits[0]
        finally:
            setattr(parent, name, body)
        return logits


class _CachedBody(nn.Module):
    """A body that repeats an output; what else a head looks up in it, a factor of Falcon-H1's, is the body's own."""

    def __init__(self, output: Any, body: nn.Module) -> None:
        super().__init__()
        self._output, self._own = output, (body,)  # in a tuple, so that it is no module of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


@contextmanager
def keep_rows(model: Any, body: str, fixed_rows: int = 0) -> Iterator[LogitRows]:
    """Collect the rows of the forward passes that are run inside the block; they may be looked at after it."""
    rows = LogitRows(model, body, fixed_rows)
    handle = model.get_submodule(body).register_forward_hook(lambda module, args, output: rows.add(output))
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def body_outputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Collect, by path, the outputs of the modules that give a last hidden state: the outermost comes last.

    `base_model_prefix` names it for most models. OPT's head follows `model.decoder`, and `model` is never called.
    """
    outputs: dict[str, Any] = {}
    paths = {module: path for path, module in model.named_modules() if path}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            outputs.pop(paths[module], None)
            outputs[paths[module]] = output

    handles = [module.register_forward_hook(keep) for module in paths]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
