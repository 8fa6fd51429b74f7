"""A grammar at work in one completion: masks for the sampler, and an end in time for `max_tokens`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from myserve.engine.constraints.json_numbers import NumberState
from myserve.grammar.compiler import in_one_line
from myserve.grammar.library import Compiled

__all__ = ["MARGIN", "GrammarConstraint", "allow", "forbid", "set_only"]

# With so many tokens to spare the text is closed: one token may carry a completion this much further from its end.
MARGIN = 8


class GrammarConstraint:
    """`core.rows.Constraint` for a compiled grammar. `remaining` is how many tokens the completion may still have.

    When `remaining` gets near what the shortest known ending takes, that ending is forced, token by token. Where it
    was looked for depends on the tokens alone, so that a completion does, too.
    """

    def __init__(
        self,
        compiled: Compiled,
        eos_ids: Sequence[int],
        vocab_size: int,
        remaining: int,
        numbers: NumberState | None = None,
    ) -> None:
        """`numbers`: of a JSON text, keeps its numbers finite."""
        self._numbers = numbers
        self._error: str | None = None
        self.closes_early = False  # whether the rest is forced
        self._compiled = compiled
        self._matcher = compiled.matcher.deep_copy()
        self._eos_ids = eos_ids
        self._mask = torch.zeros((vocab_size + 31) // 32, dtype=torch.int32)
        self._is_current = False  # whether _mask is for the next token
        self._is_over = False  # an EOS was drawn
        self._closing: deque[int] = deque()
        self._remaining = remaining
        self._look_at = -1  # look for an ending when so many remain; -1: never
        if compiled.shortest is not None:
            self._look_at = remaining - _pause(remaining - 1 - compiled.shortest)

    def fork(self) -> GrammarConstraint:
        """A copy that goes its own way."""
        twin = GrammarConstraint(self._compiled, self._eos_ids, 32 * len(self._mask), self._remaining)
        twin._error, twin.closes_early = self._error, self.closes_early
        twin._matcher = self._matcher.deep_copy()
        twin._numbers = None if self._numbers is None else self._numbers.fork()
        twin._closing = deque(self._closing)
        twin._look_at = self._look_at
        return twin

    @property
    def error(self) -> str | None:
        return self._error

    @property
    def ends(self) -> bool:
        return self._matcher.is_stopped() or (self.closes_early and not self._closing)

    @property
    def spare(self) -> int | None:
        """Tokens left over if the grammar's shortest text began now; None: no such text is known."""
        shortest = self._compiled.shortest
        return None if shortest is None else self._remaining - shortest - 1

    def mask(self) -> Tensor:
        self.prepare()
        return self._mask

    def allows(self, token_id: int) -> bool:
        """Return whether the token may come next."""
        return bool(int(self.mask()[token_id >> 5]) >> (token_id & 31) & 1)

    def prepare(self) -> None:
        """Compute the next mask, unless it is there. In any thread, but in one at a time."""
        if self._is_current or self._is_over:
            return
        self.settle()
        if self.closes_early:
            set_only(self._mask, [self._closing[0]] if self._closing else self._eos_ids)
        else:
            self._matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), 4 * len(self._mask))
            self._note_error()
            if self._numbers is not None:
                self._numbers.forbid(self._mask)
        self._is_current = True  # not before: after an exception there is no mask yet

    def settle(self) -> None:
        """Decide whether the next token is forced; what was decided depends on every token before."""
        if not self._is_over and not self.closes_early and self._remaining <= self._look_at:
            self._look_for_an_ending()

    def replay(self, token_id: int) -> None:
        """Take a token that was drawn earlier: as `append`, for which no mask is computed."""
        self.settle()
        self.append(token_id)

    def append(self, token_id: int) -> None:
        self.elapse()
        if self._closing:
            self._closing.popleft()
        self._is_over = self._is_over or token_id in self._eos_ids
        if not self._is_over and self._error is None and not self._matcher.consume_token(token_id):
            self._note_error()
        if self._numbers is not None:
            self._numbers.append(token_id)

    def forced_token_ids(self) -> list[int]:
        """Return the tokens of the bytes that alone may come next, as the tokenizer cuts them; none after an error."""
        if self._is_over or self._error is not None:
            return []
        return list(self._closing) if self.closes_early else list(self._matcher.compute_ff_tokens())

    def elapse(self) -> None:
        """A token was drawn that the grammar does not see."""
        self._remaining -= 1
        self._is_current = False

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self._error = in_one_line(self._matcher.get_error())
            set_only(self._mask, ())  # llguidance allows EOS here, as if the text were whole

    def _look_for_an_ending(self) -> None:
        assert self._compiled.shortest is not None, "else it is never looked for"
        # bounded by what this grammar may need: each step of a search costs a mask
        limit = min(self._remaining, 64 + 4 * self._compiled.shortest)
        path = self._compiled.closer.path(self._matcher.deep_copy(), limit)
        spare = self._remaining - 1 - len(path or ())  # 1: the EOS
        if path is None:
            self._look_at = -1
        elif 0 <= spare <= MARGIN:
            self._closing, self.closes_early = deque(path), True
        else:
            self._look_at = self._remaining - _pause(spare)


def _pause(spare: int) -> int:
    """Return how many tokens may pass before an ending is looked for again.

    Even at three tokens further from the end with each, there is one in reach then. So it is looked for some 4 times
    for each doubling of `max_tokens`.
    """
    return max(1, spare // 4)


def set_only(mask: Tensor, token_ids: Iterable[int]) -> None:
    """Make `mask` that of just these ids.

    >>> mask = torch.tensor([-1, -1], dtype=torch.int32)
    >>> set_only(mask, [0, 33]); mask.tolist()
    [1, 2]
    """
    mask.zero_()
    allow(mask, token_ids)


def allow(mask: Tensor, token_ids: Iterable[int]) -> None:
    """Set the bits of these ids, in place."""
    as_bytes = mask.view(torch.uint8)  # little-endian, as every machine that torch runs on
    for token_id in token_ids:
        as_bytes[token_id >> 3] |= 1 << (token_id & 7)


def forbid(mask: Tensor, token_ids: Iterable[int]) -> None:
    """Clear the bits of these ids, in place."""
    as_bytes = mask.view(torch.uint8)
    for token_id in token_ids:
        as_bytes[token_id >> 3] &= 0xFF ^ (1 << (token_id & 7))
