"""One call of a recurrent function of transformers: its arguments by name, and the packed rows that they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from myserve.engine.mixers.recurrent import Mixing

__all__ = ["Arguments", "RecurrentCall", "RecurrentFunction"]

Arguments = dict[str, Any]  # of a function, by their names


@dataclass(frozen=True, slots=True)
class RecurrentFunction:
    """A function that ours stand before.

    `rows` names the arguments that have one entry for each token, along `axis`; the first is [B, ...] like the result.
    """

    rows: tuple[str, ...]
    axis: int
    mixing: Callable[[Arguments], Mixing]  # of arguments whose rows are packed, [T, ...]
    result: Callable[[Tensor], Any]  # what is returned of [B, ...]


@dataclass(frozen=True, slots=True)
class RecurrentCall:
    """One call of such a function."""

    name: str
    function: RecurrentFunction
    arguments: Arguments
    theirs: Callable[..., Any]  # the function that ours stands before

    @property
    def size(self) -> tuple[int, int]:
        """Return how many sequences, and of how many tokens."""
        first: Tensor = self.arguments[self.function.rows[0]]
        return first.shape[0], first.shape[self.function.axis]

    def packed(self, pick: Callable[[Tensor], Tensor]) -> Mixing:
        """Return what is to be mixed: `pick` makes packed rows [T, ...] of an argument [B, T, ...]."""
        axis, rows = self.function.axis, self.function.rows
        changed = {name: pick(self.arguments[name].movedim(axis, 1)) for name in rows}
        return self.function.mixing(self.arguments | changed)

    def unpacked(self, mixed: Tensor) -> Any:
        """Return the function's result of mixed rows [B, T, ...]."""
        return self.function.result(mixed.movedim(1, self.function.axis))

    def compute_theirs(self, rows: dict[str, Tensor], others: Arguments) -> Tensor:
        """Return transformers' own result of rows [B, T, ...], as [B, T, ...], by its operations."""
        axis = self.function.axis
        moved = {name: value.movedim(1, axis) for name, value in rows.items()}
        out = self.theirs(**self.arguments | others | moved)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first.movedim(axis, 1)
