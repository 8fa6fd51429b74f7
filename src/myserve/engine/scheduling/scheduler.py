"""Plans one step and returns it as a `Batch`: requests and their blocks. Pure: no tensors, no clocks, no threads."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from typing import Literal

from myserve.engine.scheduling.adapter import AdapterVersion
from myserve.engine.scheduling.batch import Batch, Limits, ScheduledTokens
from myserve.engine.scheduling.block_tables import BlockTables
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.prompt_budget import PromptBudget
from myserve.engine.scheduling.request import Event, Request, State
from myserve.engine.scheduling.speculation import Speculation
from myserve.engine.scheduling.state_slots import StateSlots
from myserve.engine.scheduling.step_costs import READING_PACE, StepCosts
from myserve.engine.scheduling.waiting import WaitingRequests

__all__ = ["AGEING", "Drain", "Scheduler"]

# what requests in flight finish before
Drain = Literal["weights", "pause"]

# Prompt tokens that a second of waiting is worth: about a tenth of what a CPU computes in it, so that a prompt of
# 2,048 tokens is overtaken by short ones for some fifty seconds at most. (With 100, short prompts of a busy server
# waited 0.8 s instead of 0.5: `benchmarks.simulation`.)
AGEING = 40.0


class Scheduler:
    """Continuous batching: in every step running requests go on, and waiting ones come in as blocks and budget allow.

    Within a priority clients come in by turns, and each client's requests first come, first served (`waiting`). When
    blocks run out, the youngest of the least important is preempted: it loses its blocks, keeps its tokens, and is
    prefilled again later (from the prefix cache, often). So it is when a more important one waits for its place.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        speculation: Speculation | None = None,
        states: StateSlots | None = None,
    ) -> None:
        """`states`: of a model with recurrent layers."""
        self.pool = pool
        self.block_tables = BlockTables(pool, states)
        self.limits = limits
        self.speculation = speculation  # None: every token is drawn in a step of its own
        self.running: list[Request] = []  # kept sorted by Request.order
        self.step_costs = StepCosts(limits.target_inter_token_latency, limits.attention)
        self.waiting = WaitingRequests()
        self.held: dict[Request, None] = {}
        self.num_preemptions = 0
        self.weight_version = 0
        # by what waits for them, the arrivals of the requests that may still finish; the others wait
        self._draining: dict[Drain, set[int]] = {}
        self.is_paused = False  # no step is planned; `pausing` sets it
        self.released: frozenset[str] = frozenset()  # memory that a step needs and that was given back

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
        self.block_tables.give_back(request)
        if self.speculation is not None:
            self.speculation.drafter.end(request)
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

    def drain(self, before: Drain) -> None:
        """From now on let only requests in flight go on, with their siblings; all others wait for what comes then."""
        self._draining[before] = {r.arrival for r in self.in_flight}

    def is_drained(self, before: Drain) -> bool:
        """Return whether no request that was in flight at `drain` is left."""
        draining = self._draining.get(before, set())
        return not any(r.arrival in draining for r in (*self.running, *self.waiting, *self.held))

    def end_drain(self, before: Drain) -> None:
        """Let the others in again. Harmless where nothing drains."""
        self._draining.pop(before, None)

    def preempt_all(self) -> None:
        """Take every running request's blocks: it keeps its tokens, and is computed again when it comes in."""
        while self.running:
            self._preempt(self.running.pop())

    def change_weights(self, version: int) -> list[Request]:
        """Let other weights compute from the next step on; return the requests that start over.

        Requests with tokens keep their blocks. Others start over, so that a prompt is computed by one version alone.
        """
        self.weight_version = version
        self.end_drain("weights")
        return self._start_over(lambda _: True)

    def change_adapter(self, old: AdapterVersion, new: AdapterVersion) -> list[Request]:
        """Let another version of an adapter compute from the next step on, as `change_weights` does."""
        for request in (*self.running, *self.waiting, *self.held):
            if request.adapter is old:
                request.adapter = new
        return self._start_over(lambda request: request.adapter is new)

    def _start_over(self, concerns: Callable[[Request], bool]) -> list[Request]:
        """Preempt the requests that have no token yet, and return them and those that wait."""
        self._preempt_lagging(concerns)
        restarted = [r for r in self.running if not r.num_output_tokens and concerns(r)]
        for request in restarted:
            self.running.remove(request)
            self._preempt(request)
            request.times.admitted = None  # so that what it found in the old cache is not counted
        # one that was preempted in its prompt has a part of its scores by the old weights
        waiting = [r for r in self.waiting if not r.num_output_tokens and concerns(r)]
        return restarted + [r for r in waiting if r not in restarted]

    def _preempt_lagging(self, concerns: Callable[[Request], bool]) -> None:
        """Preempt the requests whose state lags behind their keys and values.

        Their next step would compute the rows between once more, by other weights than these tokens are marked with.
        """
        for request in [r for r in self.running if r.state_lag and concerns(r)]:
            self.running.remove(request)
            self._preempt(request)

    # ---- planning a step

    def schedule(self, now: float) -> Batch:
        """Plan one step. An empty batch means that there is nothing to do until something is added."""
        batch = Batch(planned=now)
        if self.is_paused or self.released:
            return batch
        self._make_way(now)
        preempted = self._continue_decodes(batch)
        # what a preemption has freed goes to running requests, not to a new one
        self._run_prompts(batch, now, admits=not preempted)
        if self.speculation is not None:
            self.speculation.add_drafts(batch, self.block_tables)
        return batch

    def _make_way(self, now: float) -> None:
        """Preempt those that run and are less important than the next to come in, as far as it has no place.

        Equals never make way. Before anything is planned: what is in a batch cannot leave it.
        """
        if not self.running or not self.waiting:
            return
        newcomer = self._first_waiting(now)
        while newcomer is not None and self.running and self.running[-1].priority > newcomer.priority:
            found = self.block_tables.find_cached(newcomer, self.weight_version)
            first = min(newcomer.num_tokens - found.num_tokens, self.limits.prefill_chunk)
            if self._has_place_for(newcomer) and self.block_tables.has_room(found, first):
                return
            self._preempt(self.running.pop())

    def _continue_decodes(self, batch: Batch) -> bool:
        """Give every decoding request its next token, preempting from the back where blocks run out."""
        preempted = False
        for request in [r for r in self.running if r.num_pending_tokens == 1]:
            rows = 1 + request.state_lag
            if (
                request.state is not State.RUNNING
                or batch.num_tokens + rows > self.limits.max_num_batched_tokens
            ):
                continue
            # the youngest is never one that the batch has already: those are older than this one
            while request.state is State.RUNNING and not self.block_tables.extend(request, 1):
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
        while not budget.is_spent:
            newcomer = self._first_waiting(now) if admits else None
            if newcomer is not None and not self._has_place_for(newcomer):
                newcomer, admits = None, False
            request = min((*prompts, *([newcomer] if newcomer else [])), key=self._urgency(now), default=None)
            if request is None:
                return
            if request is newcomer:
                count = self._admit(newcomer, budget, batch, now)
                admits = count > 0
            else:
                prompts.remove(request)
                context = request.num_computed_tokens
                count = budget.offer(request.num_pending_tokens, context)
                if not count:
                    return
                count = self.block_tables.to_border(request, count)
                if not self.block_tables.extend(request, count):
                    # what becomes free is for the prompts that have begun
                    admits = False
                    if batch.scheduled or not self._free_blocks_for(request, count, prompts):
                        continue
                budget.spend(count, context)
                self._plan(request, count, batch)

    def _free_blocks_for(self, request: Request, count: int, prompts: list[Request]) -> bool:
        """Preempt the youngest prompts until this one has its blocks, as nothing else can run; return if it has."""
        while not self.block_tables.extend(request, count):
            victim = next((r for r in reversed(self.running) if r is not request), None)
            if victim is None:
                return False
            self.running.remove(victim)
            self._preempt(victim)
            if victim in prompts:
                prompts.remove(victim)
        return True

    def _prompt_budget(self, batch: Batch) -> PromptBudget:
        """Return what `step_costs` leaves of a step for prompts; beside decodes, `prefill_chunk` tokens at most."""
        left = self.limits.max_num_batched_tokens - batch.num_tokens
        most = min(left, self.limits.prefill_chunk) if batch.num_tokens else left
        return PromptBudget(self.step_costs, batch.num_tokens, most)

    def _urgency(self, now: float) -> Callable[[Request], tuple[int, float, tuple[int, int, int]]]:
        """Shortest remaining prompt first; each second of waiting counts as AGEING tokens less."""
        return lambda r: (r.priority, r.num_pending_tokens - AGEING * (now - r.times.arrived), r.order())

    def _has_place_for(self, request: Request) -> bool:
        """Return whether one more may run side by side: surely, or because pace and blocks allow for it.

        Beyond the sure number, blocks must last for all that runs and for `request`, however long they become.
        """
        number, limits = len(self.running) + 1, self.limits
        if number > limits.max_num_seqs:
            return False
        if limits.num_seqs_at_any_pace is None or number <= limits.num_seqs_at_any_pace:
            return True
        if self.step_costs.most_seconds_of_decodes(number) > READING_PACE:
            return False
        return sum(map(self._blocks_to_the_end, [*self.running, request])) <= self.pool.num_free

    def _blocks_to_the_end(self, request: Request) -> int:
        longest = min(request.num_prompt_tokens + request.max_tokens, self.limits.max_model_len)
        return self.pool.blocks_for(longest) - len(request.block_table)

    def _admit(self, request: Request, budget: PromptBudget, batch: Batch, now: float) -> int:
        """Let a waiting request in and run its first tokens; how many, 0 where its blocks are not to be had."""
        found = self.block_tables.find_cached(request, self.weight_version)
        count = budget.offer(request.num_tokens - found.num_tokens, found.num_tokens)
        if not count or not self.block_tables.has_room(found, count):
            return 0
        self.waiting.admit(request)
        self.block_tables.begin(request, found)
        count = self.block_tables.to_border(request, count)
        budget.spend(count, found.num_tokens)
        self._admitted(request, found.num_tokens, now)
        self.block_tables.extend(request, count)
        self._plan(request, count, batch)
        return count

    def _first_waiting(self, now: float) -> Request | None:
        """The next to come in; while others drain, the next of theirs."""
        if not self._draining:
            return self.waiting.next(self.running, self._urgency(now))
        draining = set.intersection(*self._draining.values())
        return next((r for r in self.waiting if r.arrival in draining), None)

    def _admitted(self, request: Request, cached: int, now: float) -> None:
        others = (request.weight_version, request.first_adapter) != (self.weight_version, request.adapter)
        if request.num_output_tokens and others:
            request.recomputed_at = request.num_output_tokens
        request.weight_version, request.first_adapter = self.weight_version, request.adapter
        request.apply(Event.ADMIT)
        insort(self.running, request, key=Request.order)
        if request.times.admitted is None:
            request.times.admitted = now
            request.num_cached_tokens = cached

    def _plan(self, request: Request, count: int, batch: Batch) -> None:
        """Run `count` tokens of `request`; where they are its last known ones, draw its next, and its followers'."""
        lag = request.state_lag
        batch.add(ScheduledTokens(request, request.num_computed_tokens - lag, lag + count, again=lag))
        if count < request.num_pending_tokens:
            return
        if request.max_tokens == 0:
            # in this order: the end of a leader releases held siblings
            batch.scored += [*request.siblings, request]
            return
        part = len(batch.scheduled) - 1
        batch.draws.append((request, part))
        for sibling in request.siblings:
            if sibling.state is State.HELD and self._fork(request, sibling, batch):
                batch.draws.append((sibling, part))
        self._release_siblings(request)

    def _fork(self, leader: Request, sibling: Request, batch: Batch) -> bool:
        """Let a sibling share the leader's full prompt blocks, and copy the one that is filled in part."""
        room = self._has_place_for(sibling) and self.block_tables.can_fork(leader)
        if not room or leader.num_output_tokens:
            return False
        del self.held[sibling]
        sibling.apply(Event.FORK)
        sibling.weight_version, sibling.first_adapter = leader.weight_version, leader.first_adapter
        batch.copies += self.block_tables.fork(leader, sibling)
        sibling.num_cached_tokens = leader.num_prompt_tokens
        sibling.times.admitted = leader.times.admitted
        insort(self.running, sibling, key=Request.order)
        return True

    def _preempt(self, request: Request) -> None:
        request.apply(Event.PREEMPT)
        self.block_tables.give_back(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(request)

    # ---- after a step

    def update(
        self,
        batch: Batch,
        drawn: Sequence[Sequence[int | None]],
        now: float,
        sampling_seconds: float = 0.0,
        *,
        is_typical: bool = True,
    ) -> list[tuple[Request, str]]:
        """Take in what the step computed. Its seconds teach what steps cost where it `is_typical`.

        `drawn` has the tokens of each of `batch.draws`: one, or of a draft those that are right and one more; None,
        the last, where a row failed. Returns the requests that ended, and why: "stop", "length", or "error".
        """
        if is_typical:
            self._observe_seconds(batch, now - batch.planned, sampling_seconds)
        if self.speculation is not None:
            self.speculation.count(batch, drawn)
        for part in batch.scheduled:
            if not part.request.is_finished and not part.draft:
                part.request.num_computed_tokens += part.count - part.again
                self.block_tables.commit(part.request)
                self.block_tables.publish_full(part.request)
        ended: list[tuple[Request, str]] = []
        for request in batch.scored:
            if not request.is_finished:
                self.finish(request)
                ended.append((request, "length"))
        for (request, index), token_ids in zip(batch.draws, drawn, strict=True):
            if request.is_finished:
                continue
            reason = self._append(request, token_ids, len(batch.scheduled[index].draft), now)
            if reason is not None:
                self.finish(request)
                ended.append((request, reason))
        return ended

    def _observe_seconds(self, batch: Batch, seconds: float, sampling_seconds: float) -> None:
        prompts = [part for part in batch.scheduled if not part.is_decode]
        work = sum(self.step_costs.work(part.count, part.start) for part in prompts)
        # drafts are no more streams
        if batch.num_tokens == len(batch.scheduled) or prompts:
            self.step_costs.observe(len(batch.scheduled) - len(prompts), work, seconds)
        if self.speculation is not None:
            self.speculation.observe(batch, seconds - sampling_seconds)

    def _append(
        self, request: Request, token_ids: Sequence[int | None], draft: int, now: float
    ) -> str | None:
        """Give a request the tokens that one step drew for it; return why it ends with the last of them, or None."""
        reason: str | None = None
        before = request.num_tokens
        for token_id in token_ids:
            assert reason is None, "a token was drawn behind the end"
            if token_id is None:
                reason = "error"
                break
            request.append(token_id)
            reason = request.finish_reason(self.limits.max_model_len)
        appended = request.num_tokens - before
        if appended:
            request.times.last_token = now
            if request.times.first_token is None:
                request.times.first_token = now
        if draft:  # all but the last are the draft's, and were run
            self.block_tables.judge(request, draft, max(0, appended - 1))
            self.block_tables.publish_full(request)
        self.block_tables.cut(request)
        return reason

    def check_integrity(self) -> None:
        """Assert what must hold between any two steps."""
        self.pool.check_integrity(r.block_table for r in self.running)
        if (states := self.block_tables.states) is not None:
            states.check_integrity(slot for r in self.running for slot in (r.state_slot, r.next_state_slot))
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
