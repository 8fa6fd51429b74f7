"""From what a request asks of its text to the constraint of each choice; and their masks, computed ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from myserve.core.params import SamplingParams
from myserve.core.rows import Constraint
from myserve.engine.token_bytes import TokenBytes
from myserve.errors import RequestError

if TYPE_CHECKING:
    from myserve.engine.constraints.grammar import GrammarConstraint
    from myserve.engine.constraints.json_numbers import NumberBounds
    from myserve.engine.constraints.reasoning import Marks, ReasoningConstraint
    from myserve.grammar.library import Library

    ForkableConstraint = GrammarConstraint | ReasoningConstraint
else:
    ForkableConstraint = Any  # their modules are imported with the first grammar: llguidance is an extra

__all__ = ["Constraints", "MaskAhead", "end_ids"]


class Constraints:
    """Makes the constraints of one model's requests. Costs nothing until one is asked for."""

    def __init__(self, tokenizer: Any, table: TokenBytes, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._table = table
        self._eos_ids = end_ids(tokenizer, eos_ids, len(table))
        self._marks: dict[str, Marks] = {}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text under a grammar: the model's EOS ids, or the tokenizer's where it names none."""
        return self._eos_ids

    async def prepare(self, params: SamplingParams) -> None:
        """Compile what `begin` will need. Raises RequestError."""
        if params.grammar is not None:
            await self._library.prepare(params.grammar)
            if params.grammar.kind == "json_schema":  # once a model, for a loop looks at every token
                await asyncio.to_thread(lambda: self._number_bounds)

    def begin(
        self, params: SamplingParams, max_tokens: int, prior_token_ids: Sequence[int]
    ) -> ForkableConstraint | None:
        """The constraint of a completion that has `prior_token_ids` and may have `max_tokens` more."""
        if params.grammar is None and params.reasoning is None:
            return None
        constraint = self._make(params, max_tokens + len(prior_token_ids))
        for token_id in prior_token_ids:
            constraint.replay(token_id)
        if constraint.error is not None:
            raise RequestError(
                f"the last {len(prior_token_ids)} tokens of the prompt do not fit the grammar: {constraint.error}",
                param="num_prior_tokens",
            )
        return constraint

    def close(self) -> None:
        """End the compiler's thread and process."""
        if "_library" in self.__dict__:
            self._library.close()

    def _make(self, params: SamplingParams, max_tokens: int) -> ForkableConstraint:
        from myserve.engine.constraints.grammar import GrammarConstraint
        from myserve.engine.constraints.reasoning import Marks, ReasoningConstraint

        inner = None
        if params.grammar is not None:
            compiled = self._library.get(params.grammar)
            numbers = self._number_bounds.begin() if params.grammar.kind == "json_schema" else None
            inner = GrammarConstraint(compiled, self._eos_ids, len(self._table), max_tokens, numbers)
        if params.reasoning is None:
            assert inner is not None
            return inner
        marks = self._marks.get(params.reasoning.end)
        if marks is None:
            marks = self._marks[params.reasoning.end] = Marks.of(params.reasoning, self._table, self._encode)
        return ReasoningConstraint(params.reasoning, inner, self._table, marks, self._eos_ids)

    @cached_property
    def _number_bounds(self) -> NumberBounds:
        from myserve.engine.constraints.json_numbers import NumberBounds

        return NumberBounds(list(self._table))

    @cached_property
    def _library(self) -> Library:
        try:
            from myserve.grammar.compiler import Vocabulary
            from myserve.grammar.library import Library
        except ModuleNotFoundError as error:
            raise RequestError(
                f"grammars need {error.name}, which this server was installed without: pip install 'myserve[server]'",
                param="grammar",
            ) from error
        if not self._table.is_bytewise:
            raise RequestError(
                "this model's tokenizer puts text between tokens (as WordPiece does), so that no token has bytes of "
                "its own: a grammar cannot be kept to",
                param="grammar",
            )
        return Library(
            Vocabulary(list(self._table), self._table.special_ids, self._eos_ids),
            _ExactEncoder(_text_encoder(self._tokenizer), self._table),
        )

    def _encode(self, text: str) -> list[int]:
        """Return the ids of a mark of thinking, which may be a control token."""

        def encode(text: str) -> list[int]:
            return list(self._tokenizer.encode(text, add_special_tokens=False))

        return _ExactEncoder(encode, self._table)(text)


class _ExactEncoder:
    """Encodes text as ids whose bytes are the text: a tokenizer of SentencePiece's kind puts a space before one."""

    def __init__(self, encode: Callable[[str], list[int]], table: TokenBytes) -> None:
        self._encode = encode
        self._table = table

    def __call__(self, text: str) -> list[int]:
        data = text.encode()
        ids = self._encode(text)
        if self._bytes(ids) == data:
            return ids
        for anchor in ("\n", "."):  # no space is put behind it
            before, both = self._encode(anchor), self._encode(anchor + text)
            rest = both[len(before) :]
            if both[: len(before)] == before and self._bytes(rest) == data:
                return rest
        return self._longest_tokens(data)

    def _bytes(self, ids: Sequence[int]) -> bytes | None:
        if any(i >= len(self._table) for i in ids):  # the tokenizer has more ids than the model
            return None
        return b"".join([self._table[i] for i in ids])

    def _longest_tokens(self, data: bytes) -> list[int]:
        """Return the longest token at each place; the ids of the beginning alone, where a byte has none."""
        ids: list[int] = []
        while data:
            lengths = range(min(len(data), self._longest), 0, -1)
            length = next((n for n in lengths if data[:n] in self._by_bytes), None)
            if length is None:
                break
            ids.append(self._by_bytes[data[:length]])
            data = data[length:]
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        special = self._table.special_ids
        return {data: i for i, data in reversed(list(enumerate(self._table))) if data and i not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def end_ids(tokenizer: Any, eos_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Return the EOS ids that the vocabulary has; the tokenizer's, where a config names none or none that exists.

    Configs name ids beyond the vocabulary (a larger sibling's), -1, or an empty list.

    >>> from types import SimpleNamespace
    >>> end_ids(SimpleNamespace(eos_token_id=2), [7, 49155, -1], 10), end_ids(SimpleNamespace(eos_token_id=2), [], 10)
    ((7,), (2,))
    """
    for candidates in (eos_ids, [getattr(tokenizer, "eos_token_id", None)]):
        known = tuple(i for i in candidates if isinstance(i, int) and 0 <= i < vocab_size)
        if known:
            return known
    return ()


def _text_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to ids, where the text of a special token is a text: a grammar's `<|im_end|>` does not end anything."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return lambda text: list(copy.encode(text, add_special_tokens=False).ids)


class MaskAhead:
    """Computes the masks of the next draws while the model computes their logits."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def start(self, constraints: Iterable[Constraint | None]) -> None:
        """Begin with these; no other thread may touch them until `wait` is back."""
        constrained = [constraint for constraint in constraints if constraint is not None]
        if constrained:
            self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="myserve-masks")
            self._running = self._worker.submit(_prepare_all, constrained)

    def wait(self) -> None:
        """Wait until they are there. A constraint that was not among them computes its own when asked."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def close(self) -> None:
        """End the thread."""
        if self._worker is not None:
            self._worker.shutdown()


def _prepare_all(constraints: list[Constraint]) -> None:
    for constraint in constraints:
        # it fails again when its row is drawn for: there it is that row's error, here it would be all rows'
        with suppress(Exception):
            constraint.prepare()
