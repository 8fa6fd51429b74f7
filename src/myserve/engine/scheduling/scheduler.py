"""Plans one step and returns it as a `Batch`: requests and their blocks. Pure: no tensors, no clocks, no threads."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.request import Event, Request, State
from myserve.engine.scheduling.step_costs import StepCosts
from myserve.engine.scheduling.waiting import WaitingRequests

__all__ = ["AGEING", "Batch", "Limits", "ScheduledTokens", "Scheduler"]

# Prompt tokens that a second of waiting is worth: about a third of what a CPU computes in it, so that a prompt of
# 2,048 tokens is overtaken by short ones for some twenty seconds at most.
AGEING = 100.0


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """Tokens [start, start + count) of one request, to be run in this step."""

    request: Request
    start: int
    count: int


@dataclass(slots=True)
class Batch:
    """One step: run the scheduled tokens, copy blocks that forked, then draw a token for each of `draws`.

    `draws` pairs a request with the scheduled tokens whose last position gives its logits: its own, or its leader's.
    """

    scheduled: list[ScheduledTokens] = field(default_factory=list)
    draws: list[tuple[Request, int]] = field(default_factory=list)
    scored: list[Request] = field(default_factory=list)  # end with this step, for they draw nothing
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from block, to block), after the forward
    num_tokens: int = 0
    planned: float = 0.0  # when, on the clock of the caller that passes `now` in
    num_prefill_tokens: int = 0  # of num_tokens, those of requests that run more than one

    def add(self, part: ScheduledTokens) -> None:
        self.scheduled.append(part)
        self.num_tokens += part.count
        self.num_prefill_tokens += part.count if part.count > 1 else 0


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a step.

    `prefill_chunk` bounds the prompt tokens of a step in which others decode; `step_costs` takes fewer where they
    would slow the running streams down, by `target_inter_token_latency` or by its own measure.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_chunk: int
    max_model_len: int
    target_inter_token_latency: float | None = None  # seconds


class Scheduler:
    """Continuous batching: in every step running requests go on, and waiting ones come in as blocks and budget allow.

    Within a priority clients come in by turns, and each client's requests first come, first served (`waiting`). When
    blocks run out, the youngest of the least important is preempted: it loses its blocks, keeps its tokens, and is
    prefilled again later (from the prefix cache, often).
    """

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.running: list[Request] = []  # kept sorted by Request.order
        self.step_costs = StepCosts(limits.target_inter_token_latency)
        self.waiting = WaitingRequests()
        self.held: dict[Request, None] = {}
        self.num_preemptions = 0
        self.weight_version = 0
        # arrivals of the requests that may still finish; None: no swap is awaited
        self._draining: set[int] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    # ---- coming in and going out

    def add(self, request: Request) -> None:
        """Queue a request; the siblings it leads are held until its prompt is computed."""
        assert request.state is State.WAITING
        self.waiting.add(request)
        for sibling in request.siblings:
            sibling.state = State.HELD
            self.held[sibling] = None

    def abort(self, request: Request) -> None:
        """Take a request out, wherever it stands. Idempotent."""
        if not request.is_finished:
            self._leave(request, Event.ABORT)

    def finish(self, request: Request) -> None:
        """End a request that has its last token, or its scores."""
        self._leave(request, Event.FINISH)

    def _leave(self, request: Request, event: Event) -> None:
        was = request.state
        request.apply(event)
        if was is State.HELD:
            del self.held[request]
        elif was is State.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._give_back_blocks(request)
        self._release_siblings(request)

    def _release_siblings(self, request: Request) -> None:
        for sibling in request.siblings:
            if sibling.state is State.HELD:
                self._queue_held(sibling)
        request.siblings = []

    def _queue_held(self, sibling: Request) -> None:
        del self.held[sibling]
        sibling.apply(Event.RELEASE)
        self.waiting.add(sibling)

    # ---- new weights

    @property
    def in_flight(self) -> list[Request]:
        """The requests that have tokens, or are being computed."""
        return self.running + [r for r in self.waiting if r.num_output_tokens]

    def drain(self) -> None:
        """From now on let only requests in flight go on, with their siblings; all others wait."""
        self._draining = {r.arrival for r in self.in_flight}

    @property
    def is_drained(self) -> bool:
        """Whether no request that was in flight at `drain` is left."""
        draining = self._draining or set()
        return not any(r.arrival in draining for r in (*self.running, *self.waiting, *self.held))

    def change_weights(self, version: int) -> list[Request]:
        """Let other weights compute from the next step on; return the requests that start over.

        Requests with tokens keep their blocks. Others start over, so that a prompt is computed by one version alone.
        """
        self.weight_version = version
        self._draining = None
        restarted = [r for r in self.running if not r.num_output_tokens]
        for request in restarted:
            self.running.remove(request)
            self._preempt(request)
            request.times.admitted = None  # so that what it found in the old cache is not counted
        return restarted

    # ---- planning a step

    def schedule(self, now: float) -> Batch:
        """Plan one step. An empty batch means that there is nothing to do until something is added."""
        batch = Batch(planned=now)
        preempted = self._continue_decodes(batch)
        # what a preemption has freed goes to running requests, not to a new one
        self._run_prompts(batch, now, admits=not preempted)
        return batch

    def _continue_decodes(self, batch: Batch) -> bool:
        """Give every decoding request its next token, preempting from the back where blocks run out."""
        preempted = False
        for request in [r for r in self.running if r.num_pending_tokens == 1]:
            if request.state is not State.RUNNING or batch.num_tokens == self.limits.max_num_batched_tokens:
                continue
            # the youngest is never one that the batch has already: those are older than this one
            while request.state is State.RUNNING and not self._extend_blocks(request, 1):
                self._preempt(self.running.pop())
                preempted = True
            if request.state is State.RUNNING:
                self._plan(request, 1, batch)
        return preempted

    def _run_prompts(self, batch: Batch, now: float, *, admits: bool) -> None:
        """Share out the step's prompt tokens: the most urgent prompt first, of those that run and of those that wait.

        Where the next one does not fit, none is admitted in this step, so that a large one is not overtaken for ever.
        """
        budget = self._prompt_budget(batch)
        prompts = [r for r in self.running if r.num_pending_tokens > 1]
        while budget > 0:
            newcomer = self._first_waiting(now) if admits and self._has_place else None
            request = min((*prompts, *([newcomer] if newcomer else [])), key=self._urgency(now), default=None)
            if request is None:
                return
            if request is newcomer:
                count = self._admit(newcomer, budget, batch, now)
                admits = count > 0
            else:
                prompts.remove(request)
                count = min(request.num_pending_tokens, budget)
                if not self._extend_blocks(request, count):
                    # what becomes free is for the prompts that have begun
                    admits = False
                    if batch.scheduled or not self._free_blocks_for(request, count, prompts):
                        continue
                self._plan(request, count, batch)
            budget -= count

    def _free_blocks_for(self, request: Request, count: int, prompts: list[Request]) -> bool:
        """Where nothing else can run: preempt the youngest prompts until this one has its blocks; whether it has."""
        while not self._extend_blocks(request, count):
            victim = next((r for r in reversed(self.running) if r is not request), None)
            if victim is None:
                return False
            self.running.remove(victim)
            self._preempt(victim)
            if victim in prompts:
                prompts.remove(victim)
        return True

    def _prompt_budget(self, batch: Batch) -> int:
        """Prompt tokens of this step: all that is left of it where nothing decodes, else what `step_costs` allows."""
        left = self.limits.max_num_batched_tokens - batch.num_tokens
        if not batch.num_tokens:
            return left
        return min(left, self.step_costs.prompt_tokens(batch.num_tokens, self.limits.prefill_chunk))

    def _urgency(self, now: float) -> Callable[[Request], tuple[int, float, tuple[int, int, int]]]:
        """Shortest remaining prompt first; each second of waiting counts as AGEING tokens less."""
        return lambda r: (r.priority, r.num_pending_tokens - AGEING * (now - r.times.arrived), r.order())

    @property
    def _has_place(self) -> bool:
        return len(self.running) < self.limits.max_num_seqs

    def _admit(self, request: Request, budget: int, batch: Batch, now: float) -> int:
        """Let a waiting request in and run its first tokens; how many, 0 where its blocks are not to be had."""
        shared, names = self._cached_prefix(request)
        cached = len(shared) * self.pool.block_size
        count = min(request.num_tokens - cached, budget)
        newly_held = sum(1 for block in shared if not self.pool.is_held(block))
        needed = self.pool.blocks_for(cached + count) - len(shared)
        if needed + newly_held > self.pool.num_free:
            return 0
        self.waiting.admit(request)
        self.pool.hold(shared)
        request.block_table, request.content_ids = list(shared), list(names)
        request.num_computed_tokens = cached
        self._admitted(request, cached, now)
        self._extend_blocks(request, count)
        self._plan(request, count, batch)
        return count

    def _first_waiting(self, now: float) -> Request | None:
        """The next to come in; while others drain, the next of theirs."""
        if self._draining is None:
            return self.waiting.next(self.running, self._urgency(now))
        return next((r for r in self.waiting if r.arrival in self._draining), None)

    def _admitted(self, request: Request, cached: int, now: float) -> None:
        if request.num_output_tokens and request.weight_version != self.weight_version:
            request.recomputed_at = request.num_output_tokens
        request.weight_version = self.weight_version
        request.apply(Event.ADMIT)
        insort(self.running, request, key=Request.order)
        if request.times.admitted is None:
            request.times.admitted = now
            request.num_cached_tokens = cached

    def _cached_prefix(self, request: Request) -> tuple[list[int], list[int]]:
        """At least one token is always left to run, for its logits are what the next token is drawn from."""
        if request.needs_prompt_logits and request.num_output_tokens == 0:
            return [], []
        return self.pool.match(
            self._root(request, self.weight_version), request.token_ids[: request.num_tokens - 1]
        )

    @staticmethod
    def _root(request: Request, weight_version: int) -> Hashable:
        """Where the names of a request's blocks begin: blocks of two versions are never taken for one another.

        Versions only grow, so blocks that older weights began can never be found again, whatever is added to them.
        """
        return (request.cache_root, weight_version)

    def _extend_blocks(self, request: Request, count: int) -> bool:
        missing = self.pool.blocks_for(request.num_computed_tokens + count) - len(request.block_table)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            request.block_table += self.pool.allocate(missing)
        return True

    def _plan(self, request: Request, count: int, batch: Batch) -> None:
        """Run `count` tokens of `request`; where they are its last known ones, draw its next, and its followers'."""
        batch.add(ScheduledTokens(request, request.num_computed_tokens, count))
        if count < request.num_pending_tokens:
            return
        if request.max_tokens == 0:
            batch.scored += [
                *request.siblings,
                request,
            ]  # in this order: the end of a leader releases held siblings
            return
        part = len(batch.scheduled) - 1
        batch.draws.append((request, part))
        for sibling in request.siblings:
            if sibling.state is State.HELD and self._fork(request, sibling, batch):
                batch.draws.append((sibling, part))
        self._release_siblings(request)

    def _fork(self, leader: Request, sibling: Request, batch: Batch) -> bool:
        """Let a sibling share the leader's full prompt blocks, and copy the one that is filled in part."""
        full, rest = divmod(leader.num_prompt_tokens, self.pool.block_size)
        room = len(self.running) < self.limits.max_num_seqs and self.pool.num_free >= (1 if rest else 0)
        if not room or leader.num_output_tokens:
            return False
        del self.held[sibling]
        sibling.apply(Event.FORK)
        sibling.weight_version = leader.weight_version
        shared = leader.block_table[:full]
        self.pool.hold(shared)
        sibling.block_table = list(shared)
        if rest:
            sibling.block_table += self.pool.allocate(1)
            batch.copies.append((leader.block_table[full], sibling.block_table[full]))
        sibling.num_computed_tokens = leader.num_prompt_tokens
        sibling.num_cached_tokens = leader.num_prompt_tokens
        sibling.content_ids = []
        sibling.times.admitted = leader.times.admitted
        insort(self.running, sibling, key=Request.order)
        return True

    def _preempt(self, request: Request) -> None:
        request.apply(Event.PREEMPT)
        self._give_back_blocks(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(request)

    def _give_back_blocks(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table, request.content_ids = [], []
        request.num_computed_tokens = 0

    # ---- after a step

    def update(self, batch: Batch, drawn: Sequence[int | None], now: float) -> list[tuple[Request, str]]:
        """Take in what the step computed. `drawn` has a token for each of `batch.draws`, or None where a row failed.

        Returns the requests that ended, and why: "stop", "length", or "error" for a row that failed.
        """
        decodes = sum(1 for part in batch.scheduled if part.count == 1)
        self.step_costs.observe(decodes, batch.num_prefill_tokens, now - batch.planned)
        for part in batch.scheduled:
            if not part.request.is_finished:
                part.request.num_computed_tokens += part.count
                self._publish_full_blocks(part.request)
        ended: list[tuple[Request, str]] = []
        for request in batch.scored:
            if not request.is_finished:
                self.finish(request)
                ended.append((request, "length"))
        for (request, _), token_id in zip(batch.draws, drawn, strict=True):
            if request.is_finished:
                continue
            if token_id is None:
                reason: str | None = "error"
            else:
                request.append(token_id)
                request.times.last_token = now
                if request.times.first_token is None:
                    request.times.first_token = now
                reason = request.finish_reason(self.limits.max_model_len)
            if reason is not None:
                self.finish(request)
                ended.append((request, reason))
        return ended

    def _publish_full_blocks(self, request: Request) -> None:
        size = self.pool.block_size
        for index in range(len(request.content_ids), request.num_computed_tokens // size):
            root = self._root(request, request.weight_version)
            parent = request.content_ids[-1] if request.content_ids else root
            tokens = request.token_ids[index * size : (index + 1) * size]
            request.content_ids.append(self.pool.publish(request.block_table[index], parent, tokens))

    def check_integrity(self) -> None:
        """Assert what must hold between any two steps."""
        self.pool.check_integrity(r.block_table for r in self.running)
        assert all(r.state is State.RUNNING for r in self.running), "a running request is in another state"
        assert all(r.state is State.WAITING and not r.block_table for r in self.waiting), (
            "a waiting request holds blocks"
        )
        assert all(r.state is State.HELD and not r.block_table for r in self.held), (
            "a held request holds blocks"
        )
        assert len(self.running) <= self.limits.max_num_seqs
        for request in self.running:
            need = self.pool.blocks_for(request.num_computed_tokens)
            assert len(request.block_table) >= need, "computed tokens without blocks"
