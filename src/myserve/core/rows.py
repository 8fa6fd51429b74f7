"""RowState: what a completion's sampling remembers. It grows by `append` and is never rebuilt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

from myserve.core.noise import CounterKey, CounterNoise, TorchNoise
from myserve.core.params import SamplingParams
from myserve.errors import RequestError

__all__ = ["BadWords", "Constraint", "History", "RowState"]

CPU = torch.device("cpu")


class Constraint(Protocol):
    """The tokens that may come next in one completion. It grows with the completion and depends on its tokens alone."""

    @property
    def error(self) -> str | None:
        """The reason why nothing can come next: the grammar has become too costly, or has no way on."""

    @property
    def closes_early(self) -> bool:
        """True where the rest is forced, so that it is whole within `max_tokens`."""

    @property
    def ends(self) -> bool:
        """True where the completion may only end."""

    def prepare(self) -> None:
        """Compute the next mask, in any thread; `mask` does so itself where this was not called."""

    def mask(self) -> Tensor | None:
        """int32 [ceil(V / 32)] on the CPU: token i may come where bit i % 32 of word i // 32 is set. None: any may."""

    def append(self, token_id: int) -> None:
        """Take in the token that was drawn."""

    def forced_token_ids(self) -> Sequence[int]:
        """Return tokens that are likely to come next since little else may: a draft, which need not be right."""


class RowState:
    """One completion's sampling state, from its first token to its last.

    `completion_token_ids` starts it in mid-completion, as if each of them had been drawn and appended: for a
    completion that goes on elsewhere. (A preempted one just keeps its RowState.) A `constraint` has these
    tokens behind it.

    >>> row = RowState(SamplingParams(frequency_penalty=0.5), seed=7, sample_index=0, prompt_token_ids=[1, 2],
    ...                vocab_size=8, eos_token_ids=[0])
    >>> row.append(5); row.append(5)
    >>> row.num_completion_tokens, row.position, row.edits_scores
    (2, 4, True)
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        sample_index: int,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: torch.device = CPU,
        completion_token_ids: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        params.check_vocabulary(vocab_size)
        if not 0 <= sample_index < 2**32:
            raise RequestError(f"a sample index must be in [0, 2**32), got {sample_index}", param="n")
        self.params = params
        self.vocab_size = vocab_size
        self.device = device
        self.position = len(prompt_token_ids)  # of the next token, in prompt and completion together
        self.num_completion_tokens = 0
        self.bad_words: BadWords | None = None
        if params.bad_words_ids:
            index = params.derived("bad words", lambda: BadWordIndex(params.bad_words_ids))
            self.bad_words = BadWords(index, prompt_token_ids)
        self.end_token_ids = tuple(dict.fromkeys((*eos_token_ids, *params.stop_token_ids)))
        self.history: History | None = None
        if _penalised(params):
            counted = prompt_token_ids if params.repetition_penalty != 1.0 else ()
            self.history = History(counted, vocab_size, device)
        self.constraint: Constraint | None = None
        self._always_edits = bool(params.allowed_token_ids or params.bad_words_ids or params.logit_bias)
        self.noise = CounterNoise(seed, sample_index)
        self.torch_noise: TorchNoise | None = None
        if params.noise == "torch" and params.temperature > 0:
            self.torch_noise = TorchNoise(seed, sample_index, device)
            self.torch_noise.skip(len(completion_token_ids), vocab_size)
        for token_id in completion_token_ids:
            self.append(token_id)
        self.constraint = constraint

    @property
    def edits_scores(self) -> bool:
        """True where any of stages 1 to 4 may change this row's next scores."""
        return (
            self._always_edits
            or self.constraint is not None
            or bool(self.history)
            or self.num_completion_tokens < self.params.min_tokens
        )

    @property
    def remembers(self) -> bool:
        """True where the next draws depend on the tokens before them in another way than by their logits."""
        return (
            self.history is not None
            or self.bad_words is not None
            or self.constraint is not None
            or self.torch_noise is not None
            or self.num_completion_tokens < self.params.min_tokens
        )

    def ahead(self, tokens: int) -> RowState:
        """Return the state that so many tokens more will make of one that does not remember them."""
        assert not self.remembers, "what these tokens are would matter"
        later = copy(self)
        later.position += tokens
        later.num_completion_tokens += tokens
        return later

    @property
    def counter_key(self) -> CounterKey:
        """The counter noise of the next draw."""
        return self.noise.at(self.position)

    def restore_noise(self) -> None:
        """Put torch noise back to where the next draw takes it from, after a draw that came to nothing."""
        if self.torch_noise is not None:
            self.torch_noise = TorchNoise(self.noise.seed, self.noise.sample_index, self.device)
            self.torch_noise.skip(self.num_completion_tokens, self.vocab_size)

    def append(self, token_id: int) -> None:
        """Take in the token that was drawn."""
        self.position += 1
        self.num_completion_tokens += 1
        if self.history is not None:
            self.history.append(token_id)
        if self.bad_words is not None:
            self.bad_words.append(token_id)
        if self.constraint is not None:
            self.constraint.append(token_id)

    def forbidden_token_ids(self) -> Iterable[int]:
        """Return the ids that may not come next: ends of a completion that is too short, last ids of bad words."""
        complete = self.constraint is not None and self.constraint.ends  # then there is nothing to go on with
        if self.num_completion_tokens < self.params.min_tokens and not complete:
            yield from (token_id for token_id in self.end_token_ids if token_id < self.vocab_size)
        if self.bad_words is not None:
            yield from self.bad_words.completions()


class History:
    """The ids that a completion (for the repetition penalty, its prompt too) has, with their counts.

    On the device, one entry a distinct id: a step costs the tokens seen, not the vocabulary, and adds one
    number.
    """

    @torch.inference_mode()  # here and in `append`: whatever mode the caller is in, they agree
    def __init__(self, prompt_token_ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
        known = [token_id for token_id in dict.fromkeys(prompt_token_ids) if 0 <= token_id < vocab_size]
        self._slots = {token_id: slot for slot, token_id in enumerate(known)}
        capacity = max(64, 2 * len(known))
        self._ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._ids[: len(known)] = torch.tensor(known, dtype=torch.int64)
        self._counts = torch.zeros(capacity, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return len(self._slots)

    @torch.inference_mode()
    def append(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = torch.cat((self._ids, torch.zeros_like(self._ids)))
            self._counts = torch.cat((self._counts, torch.zeros_like(self._counts)))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    def ids(self) -> Tensor:
        """int64 [N], distinct."""
        return self._ids[: len(self._slots)]

    def counts(self) -> Tensor:
        """float32 [N], beside `ids`; 0 for ids that only the prompt has."""
        return self._counts[: len(self._slots)]


class BadWordIndex:
    """Forbidden sequences by the id before their last: a step looks at those that may be complete, not at all."""

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        self.longest = max(map(len, words))
        self.alone = tuple(dict.fromkeys(word[0] for word in words if len(word) == 1))
        self.behind: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for word in words:
            if len(word) > 1:
                self.behind.setdefault(word[-2], []).append((word[:-1], word[-1]))


class BadWords:
    """The ids that would complete a forbidden sequence: remembers a tail as long as the longest needs."""

    def __init__(self, words: BadWordIndex, prompt_token_ids: Sequence[int]) -> None:
        self._words = words
        longest = words.longest - 1
        self._tail = deque(prompt_token_ids[-longest:] if longest else (), maxlen=longest)

    def append(self, token_id: int) -> None:
        self._tail.append(token_id)

    def completions(self) -> list[int]:
        tail = tuple(self._tail)
        begun = self._words.behind.get(tail[-1], ()) if tail else ()
        return [*self._words.alone, *(last for prefix, last in begun if tail[-len(prefix) :] == prefix)]


def _penalised(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)
