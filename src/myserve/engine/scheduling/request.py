"""One completion's life, as a table: a move that the table has not is a bug of ours, never a state of affairs."""

from __future__ import annotations

from collections.abc import Container, Hashable
from dataclasses import dataclass, field
from enum import Enum

from myserve.engine.scheduling.adapter import AdapterVersion

__all__ = ["Event", "Request", "State", "Times"]


class State(Enum):
    HELD = "held"  # one of n: waits for the prompt that its leader prefills
    WAITING = "waiting"  # has no blocks: new, or preempted
    RUNNING = "running"  # has blocks; takes part in steps
    FINISHED = "finished"  # stop, length, abort or error; owns nothing


class Event(Enum):
    ADMIT = "admit"
    FORK = "fork"  # the leader's prompt is computed: share its blocks
    RELEASE = "release"  # the leader cannot be followed (no room, or it was aborted): queue as others do
    PREEMPT = "preempt"
    FINISH = "finish"
    ABORT = "abort"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.HELD, Event.FORK): State.RUNNING,
    (State.HELD, Event.RELEASE): State.WAITING,
    (State.HELD, Event.FINISH): State.FINISHED,  # there is nothing to draw
    (State.HELD, Event.ABORT): State.FINISHED,
    (State.WAITING, Event.ADMIT): State.RUNNING,
    (State.WAITING, Event.ABORT): State.FINISHED,
    (State.RUNNING, Event.PREEMPT): State.WAITING,
    (State.RUNNING, Event.FINISH): State.FINISHED,
    (State.RUNNING, Event.ABORT): State.FINISHED,
}


@dataclass(slots=True)
class Times:
    """The moments of a request's life in seconds, on the clock of the caller that passes `now` in."""

    arrived: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One choice of one submitted prompt: token ids, limits, and where it stands. No tensors.

    `num_computed_tokens` of its `token_ids` have their keys and values in `block_table`; the rest is still to run.

    >>> r = Request(id="r", prompt_token_ids=[1, 2, 3], max_tokens=4)
    >>> r.apply(Event.ADMIT); r.append(9); r.state, r.num_tokens, r.num_output_tokens
    (<State.RUNNING: 'running'>, 4, 1)
    >>> r.apply(Event.ADMIT)
    Traceback (most recent call last):
    ...
    AssertionError: request r: no way from running by admit
    """

    id: str
    prompt_token_ids: list[int]
    max_tokens: int  # 0: the prompt is scored, and nothing is drawn
    index: int = 0  # the choice, among the n of one submission
    stop_ids: Container[int] = ()
    priority: int = 0  # lower runs first
    client: str = ""  # within a priority, clients are admitted in turns
    arrival: int = 0  # submission order, which breaks ties of priority
    # what a cached prefix must agree on beside tokens and weight version: the salt
    cache_root: Hashable = None
    adapter: AdapterVersion | None = None  # that computes with it; None: the model alone
    needs_prompt_logits: bool = False  # prompt logprobs: every position must be run, so no cached prefix
    siblings: list[Request] = field(default_factory=list)  # held until this one's prompt is computed

    state: State = State.WAITING
    token_ids: list[int] = field(init=False)  # prompt, then completion
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, at its first admission
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # that were verified
    num_accepted_tokens: int = 0  # of them, those that were drawn
    weight_version: int = 0  # the one that computed its first block
    first_adapter: AdapterVersion | None = None  # likewise
    # output tokens it had when they and its prompt were run again by newer weights
    recomputed_at: int | None = None
    block_table: list[int] = field(default_factory=list)
    content_ids: list[int] = field(default_factory=list)  # the prefix cache's names of the full blocks
    # of a model with recurrent layers: the slot of the state after its computed tokens (-1: it has none, and begins
    # from zeros), and the one that its next step leaves it in
    state_slot: int = -1
    next_state_slot: int = -1
    state_borders: list[int] = field(default_factory=list)  # tokens of its prompt behind which a step ends
    state_lag: int = (
        0  # of its computed tokens, the last that `state_slot` has not taken in: behind a wrong draft
    )
    kept_state: int | None = None  # the content that the prefix cache has its completion's last state of
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Known tokens that have not been run: one when decoding, many when prefilling."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.state is State.FINISHED

    def order(self) -> tuple[int, int, int]:
        """Return the key by which requests go first and, read backwards, are preempted first."""
        return (self.priority, self.arrival, self.index)

    def apply(self, event: Event) -> None:
        """Move along the table."""
        target = TRANSITIONS.get((self.state, event))
        assert target is not None, f"request {self.id}: no way from {self.state.value} by {event.value}"
        self.state = target

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    def finish_reason(self, max_model_len: int) -> str | None:
        """Return why this request ends with the token that it has just got, or None."""
        if self.token_ids[-1] in self.stop_ids:
            return "stop"
        if self.num_output_tokens >= self.max_tokens or self.num_tokens >= max_model_len:
            return "length"
        return None
