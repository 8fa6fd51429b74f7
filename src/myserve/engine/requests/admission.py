"""Admission: every check of a request that needs the model's own numbers, and the requests that pass."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import index as as_integer

import torch

from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.stopping import StopIds
from myserve.engine.constraints.factory import Constraints, ForkableConstraint
from myserve.engine.outputs import RoutingShape
from myserve.engine.requests.lengths import checked_max_tokens
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.requests.stream import OutcomeReceiver
from myserve.engine.scheduling.request import Request
from myserve.errors import RequestError

__all__ = ["ModelFacts", "Submission", "admit", "checked_prompt", "checked_request"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The numbers of a model that a request is checked against."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    routing_shape: RoutingShape | None = None  # of a mixture of experts


@dataclass(slots=True, eq=False)
class Submission:
    """One call of `submit`: what was asked, and the requests that it became. `stream` is set once, right after."""

    prompt_token_ids: list[int]
    params: SamplingParams
    options: SubmitOptions
    facts: ModelFacts
    request_id: str
    seed: int
    eos_token_ids: Sequence[int]
    ends: StopIds
    loop: asyncio.AbstractEventLoop
    constraint: ForkableConstraint | None  # behind the prior tokens, and copied for each choice
    requests: list[Request] = field(default_factory=list)
    stream: OutcomeReceiver = field(init=False)

    @property
    def skips_noise(self) -> bool:
        """Return whether its sampling states begin behind draws that have to be made up for, which takes time."""
        return (
            self.options.num_prior_tokens > 0 and self.params.noise == "torch" and self.params.temperature > 0
        )

    def row_states(self, device: torch.device) -> list[RowState]:
        """Return the sampling states of all choices. Any thread may make them."""
        return [self.row_state(request.index, device) for request in self.requests]

    def row_state(self, index: int, device: torch.device) -> RowState:
        """The sampling state of choice `index`. Prior tokens count as its completion, not as its prompt."""
        prompt_length = len(self.prompt_token_ids) - self.options.num_prior_tokens
        return RowState(
            self.params,
            seed=self.seed,
            sample_index=self.options.sample_index + index,
            prompt_token_ids=self.prompt_token_ids[:prompt_length],
            completion_token_ids=self.prompt_token_ids[prompt_length:],
            vocab_size=self.facts.vocab_size,
            eos_token_ids=self.eos_token_ids,
            device=device,
            constraint=self.constraint and self.constraint.fork(),
        )


def admit(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    options: SubmitOptions,
    facts: ModelFacts,
    *,
    arrival: int,
    cache_root: Hashable,
    constraints: Constraints,
    now: float,
) -> Submission:
    """Check a request against its model, draw a seed if none is given, and make its n `Request`s.

    `arrival` is its place in the order of submission, `cache_root` what a cached prefix must agree on, `now` the
    scheduler's clock. Raises `RequestError`, `ContextLengthError`.
    """
    prompt, max_tokens = checked_request(prompt_token_ids, params, options, facts)
    # a model may know no EOS, but a grammar's text must be able to end
    eos_token_ids = facts.eos_token_ids if params.grammar is None else constraints.end_ids
    ends = StopIds(
        eos_token_ids=eos_token_ids, stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos
    )
    submission = Submission(
        prompt,
        params,
        options,
        facts,
        request_id=options.request_id or f"req-{arrival}",
        seed=secrets.randbits(64) if params.seed is None else params.seed,
        eos_token_ids=eos_token_ids,
        ends=ends,
        loop=asyncio.get_running_loop(),
        constraint=constraints.begin(params, max_tokens, prompt[len(prompt) - options.num_prior_tokens :]),
    )
    for index in range(options.n):
        request = Request(
            id=f"{submission.request_id}/{index}",
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            index=index,
            stop_ids=ends,
            priority=options.priority,
            client=options.client,
            arrival=arrival,
            cache_root=cache_root,
            needs_prompt_logits=params.prompt_logprobs is not None and index == 0,
        )
        request.times.arrived = now
        submission.requests.append(request)
    submission.requests[0].siblings = submission.requests[1:]
    return submission


def checked_request(
    prompt_token_ids: Sequence[int], params: SamplingParams, options: SubmitOptions, facts: ModelFacts
) -> tuple[list[int], int]:
    """Return the prompt and how many tokens may be drawn behind it. Raises `RequestError`, `ContextLengthError`."""
    prompt = checked_prompt(prompt_token_ids, facts.vocab_size)
    num_prior_tokens = options.num_prior_tokens
    if num_prior_tokens >= len(prompt):
        raise RequestError(
            f"num_prior_tokens must be in [0, {len(prompt) - 1}], for the prompt has {len(prompt)} tokens; "
            f"got {num_prior_tokens}",
            param="num_prior_tokens",
        )
    num_counted = num_prior_tokens if options.counts_prior_tokens else 0
    asked = None if params.max_tokens is None else params.max_tokens - num_counted
    if asked is not None and num_counted and asked < 1:
        raise RequestError(
            f"the completion has {num_counted} tokens already, and max_tokens is {params.max_tokens}: nothing is left "
            "to draw",
            param="max_tokens",
        )
    max_tokens = checked_max_tokens(len(prompt), asked, facts.max_model_len)
    most = max_tokens + num_prior_tokens
    if params.min_tokens > most:
        raise RequestError(
            f"min_tokens must be in [0, {most}], which the context leaves behind a prompt of "
            f"{len(prompt) - num_prior_tokens} tokens, got {params.min_tokens}",
            param="min_tokens",
        )
    params.check_vocabulary(facts.vocab_size)
    _check_scoring(len(prompt), params)
    if params.routed_experts and facts.routing_shape is None:
        raise RequestError(
            "this model is dense: it has no experts to report (include_routing_matrix, routed_experts); leave it out",
            param="include_routing_matrix",
        )
    return prompt, max_tokens


def _check_scoring(num_prompt_tokens: int, params: SamplingParams) -> None:
    """Raise RequestError for a place in the prompt that it does not have, or rows of ids for other tokens."""
    if params.prompt_logprob_start >= num_prompt_tokens:
        raise RequestError(
            f"prompt_logprob_start must be in [0, {num_prompt_tokens - 1}], for the prompt has {num_prompt_tokens} "
            f"tokens; got {params.prompt_logprob_start}",
            param="prompt_logprob_start",
        )
    rows, scored = len(params.prompt_logprob_token_ids), num_prompt_tokens - 1 - params.prompt_logprob_start
    if rows > 1 and rows != scored:
        raise RequestError(
            f"prompt_logprob_token_ids has {rows} rows, and {scored} tokens of the prompt are scored",
            param="prompt_logprob_token_ids",
        )


def checked_prompt(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Return the prompt as a list of ids of this vocabulary; a prompt of text must have been tokenized before.

    Any integers will do, a tensor's or an array's too. Raises `RequestError`.
    """
    try:
        prompt = [as_integer(token_id) for token_id in token_ids]
    except TypeError as error:
        raise RequestError(f"the prompt must be integers: {error}", param="prompt") from None
    if not prompt:
        raise RequestError("the prompt has no tokens; give at least one", param="prompt")
    for token_id in prompt:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"the prompt holds token id {token_id}, which is out of vocabulary: this model's ids are 0 to "
                f"{vocab_size - 1}",
                param="prompt",
            )
    return prompt
