"""Drafts by a smaller model of the same vocabulary, where a text's own n-grams have nothing likely.

It draws with the noise that the target will draw with. Noise is a function of seed, index, position and id, so where
the two distributions are alike, so are the draws: the same token arrives first in both races. Drawn with noise of its
own, a draft at temperature 1 would be right only as often as two samples agree.

A model with recurrent layers goes back to the state that it had before it drafted, where a draft was wrong: that of the
last token that the text has for certain. What was right of the draft is run again behind it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.sampling import Sampled
from myserve.engine.config import EngineConfig
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.scheduling.batch import Batch, ScheduledTokens
from myserve.engine.scheduling.block_tables import BlockTables
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.state_slots import StateSlots
from myserve.engine.weights.loader import LoadedModel
from myserve.errors import UnsupportedModelError

__all__ = ["MOST_BY_MODEL", "DraftModel", "check_vocabulary"]

MOST_BY_MODEL = 6  # tokens of one draft: each is a pass of its own
_SHARE = 0.25  # of what the target's KV cache may take
_SMOOTHING = 0.1


def check_vocabulary(draft: LoadedModel, target: LoadedModel, name: str) -> None:
    """Raise UnsupportedModelError unless every token of the target has the same id in the draft model."""
    own, other = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if own == other:
        return
    different = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    raise UnsupportedModelError(
        f"the draft model {name} has another vocabulary ({len(different)} tokens differ, the first {different[0]!r}); "
        "give a draft model of the same family, or none",
        param="draft_model",
    )


@dataclass(slots=True, eq=False)
class _Mirror:
    """A request as the draft model has it: its own blocks and states, and what it has computed."""

    request: Request
    row: RowState
    num_known: int = 0  # tokens of its text; those behind them it has drafted
    # of a model with recurrent layers: the state behind the last of them that it has computed; -1: before the first
    known_slot: int = -1
    num_in_known_slot: int = 0


class DraftModel:
    """A second model with a KV cache of its own, which follows the requests that it drafts for."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, vocab_size: int) -> None:
        bytes_ = None if config.kv_cache_bytes is None else max(1, int(_SHARE * config.kv_cache_bytes))
        share = _SHARE * config.kv_cache_share
        # it follows the requests that run, and looks for no others' prefixes
        own = replace(
            config, kv_cache_bytes=bytes_, kv_cache_share=share, draft_model=None, prefix_caching=False
        )
        self.runner = ModelRunner(loaded, own)
        self._vocab_size = min(vocab_size, loaded.vocab_size)
        self._chunk = config.prefill_chunk
        cache = self.runner.kv_cache
        states = StateSlots(cache.num_state_slots) if cache.states else None
        self._tables = BlockTables(BlockPool(cache.num_blocks, cache.block_size), states)
        self._mirrors: dict[Request, _Mirror] = {}  # the one that was used last comes last
        self.pass_seconds = 0.0  # of one token more, a moving average

    @torch.inference_mode()
    def draft(self, asked: Sequence[tuple[Request, RowState, int]]) -> list[tuple[int, ...]]:
        """Return so many drafted tokens of each request: none while its text is still being read."""
        drafted: dict[Request, list[int]] = {request: [] for request, _, _ in asked}
        mirrors = {request: self._follow(request, row) for request, row, _ in asked}
        most = {request: count for request, _, count in asked}
        going = [request for request, _, _ in asked]
        while going:
            going = [r for r in going if self._has_room(mirrors[r].request, mirrors.keys())]
            if not going:
                break
            for request, token_id in zip(going, self._pass([mirrors[r] for r in going]), strict=True):
                if token_id is not None:
                    drafted[request].append(token_id)
            going = [
                r
                for r in going
                if drafted[r] and len(drafted[r]) < most[r] and mirrors[r].request.num_pending_tokens == 1
            ]
        return [tuple(drafted[request]) for request, _, _ in asked]

    def end(self, request: Request) -> None:
        """Let go of a request's blocks and states."""
        if (mirror := self._mirrors.pop(request, None)) is not None:
            self._tables.give_back(mirror.request)
            self._keep_known(mirror, -1)

    def close(self) -> None:
        self.runner.close()

    def _follow(self, request: Request, row: RowState) -> _Mirror:
        """Return the mirror with the request's tokens; what it computed of other ones counts no longer."""
        mirror = self._mirrors.pop(request, None) or _Mirror(
            Request(id=request.id, prompt_token_ids=[], max_tokens=request.max_tokens),
            _with_its_noise(row, self._vocab_size),
        )
        self._mirrors[request] = mirror
        own, known = mirror.request, request.token_ids
        same = min(own.num_computed_tokens, len(known) - 1)
        begin = max(0, same - 2 * MOST_BY_MODEL)  # what was drafted last; all before it was drawn
        while begin < same and own.token_ids[begin] == known[begin]:
            begin += 1
        if begin == own.num_computed_tokens:  # all that it has computed is text by now
            self._keep_known(mirror, own.state_slot)
        elif self._tables.states is not None:
            begin = self._go_back(mirror, begin)
        own.num_computed_tokens = begin
        del own.token_ids[own.num_computed_tokens :]
        own.token_ids += known[own.num_computed_tokens :]
        self._tables.cut(own)
        mirror.num_known = len(known)
        mirror.row.position = row.position
        return mirror

    def _go_back(self, mirror: _Mirror, right: int) -> int:
        """Take up the last state that has none but tokens of the text; return how many of the `right` ones it has."""
        if mirror.num_in_known_slot > right:  # its last token is to be run once more: from the beginning
            self._keep_known(mirror, -1)
        self._hold(mirror.known_slot)
        self._release(mirror.request.state_slot)
        mirror.request.state_slot = mirror.known_slot
        return mirror.num_in_known_slot

    def _keep_known(self, mirror: _Mirror, slot: int) -> None:
        """Hold a state of a mirror, in the place of the one that is held as having none but tokens of the text."""
        self._hold(slot)
        self._release(mirror.known_slot)
        mirror.known_slot = slot
        mirror.num_in_known_slot = mirror.request.num_computed_tokens if slot >= 0 else 0

    def _hold(self, slot: int) -> None:
        if self._tables.states is not None and slot >= 0:
            self._tables.states.hold(slot)

    def _release(self, slot: int) -> None:
        if self._tables.states is not None and slot >= 0:
            self._tables.states.release(slot)

    def _has_room(self, own: Request, beside: Collection[Request]) -> bool:
        """Give a mirror blocks for its next pass; where need be those of the one used least recently, not of these."""
        count = min(own.num_pending_tokens, self._chunk)
        if own.num_tokens >= self.runner.max_model_len:
            return False
        while not self._tables.extend(own, count):
            oldest = next(iter(self._mirrors))
            if oldest in beside:
                return False
            self.end(oldest)
        return True

    def _pass(self, mirrors: Sequence[_Mirror]) -> list[int | None]:
        """Run what each has pending, a chunk at most, and draw its next token; None where more is pending."""
        began = time.perf_counter()
        batch, last, row = Batch(), list[int](), -1
        for mirror in mirrors:
            own = mirror.request
            count = min(own.num_pending_tokens, self._chunk)
            batch.add(ScheduledTokens(own, own.num_computed_tokens, count))
            row += count
            last.append(row)
        logits = self.runner.forward(batch, last)[:, : self._vocab_size]
        outcomes = self.runner.sampler.sample(logits, [mirror.row for mirror in mirrors])
        drawn: list[int | None] = []
        for mirror, part, outcome in zip(mirrors, batch.scheduled, outcomes, strict=True):
            own = mirror.request
            own.num_computed_tokens += part.count
            self._tables.commit(own)
            if own.num_computed_tokens <= mirror.num_known:
                self._keep_known(mirror, own.state_slot)
            if own.num_pending_tokens or not isinstance(outcome, Sampled):
                drawn.append(None)
                continue
            own.append(outcome.token_id)
            mirror.row.position += 1
            drawn.append(outcome.token_id)
        if not batch.num_prefill_tokens:
            seconds = time.perf_counter() - began
            self.pass_seconds += (_SMOOTHING if self.pass_seconds else 1.0) * (seconds - self.pass_seconds)
        return drawn


def _with_its_noise(row: RowState, vocab_size: int) -> RowState:
    """Return a state that draws with the noise of `row`, from what its temperature and truncation leave.

    Penalties, grammars and the rest are left out: a draft need not be right.
    """
    p, noise = row.params, row.noise
    params = SamplingParams(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p)
    return RowState(
        params,
        seed=noise.seed,
        sample_index=noise.sample_index,
        prompt_token_ids=(),
        vocab_size=vocab_size,
        eos_token_ids=(),
        device=row.device,
    )
