"""A conversation over many turns in which no sampled token is ever encoded again.

`tokens` only grows, so each prompt begins with the one before it and what was sampled after it. Where old
turns are dropped, a new trajectory begins, and the answers that it keeps are still the tokens that were sampled.
(Encoding the whole conversation anew each turn was rejected: text that a model wrote rarely tokenizes back to the
tokens that it sampled, and a trainer then scores tokens that were never drawn.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from myserve.sdk.request import DEFAULT_MAX_TOKENS, as_token_ids
from myserve.sdk.types import Completions, SampledCompletion

__all__ = ["Conversation", "Message", "Trajectory", "TurnSampler"]

Message = Mapping[str, Any]
# Stands for an assistant's answer while a template is rendered around it; no template or model writes this.
_MARK = "answer-7c1f9e52"


class TurnSampler(Protocol):
    """The part of a `DeploymentSampler` that a conversation uses."""

    @property
    def tokenizer(self) -> Any: ...
    async def sample_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], **options: Any
    ) -> Completions: ...


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Hold one training sample: a conversation as far as each prompt began with the last. Equally long lists."""

    tokens: list[int] = field(default_factory=list)
    # True where the model chose within this trajectory: what a loss is for. Answers that a truncation carried over
    # were chosen in another context, and are trained on in the trajectory before.
    is_sampled: list[bool] = field(default_factory=list)
    # of the sampled tokens, where they were asked for
    logprobs: list[float | None] = field(default_factory=list)

    def extended(
        self, ids: Sequence[int], logprobs: Sequence[float] | None = None, *, sampled: bool
    ) -> Trajectory:
        """Return a trajectory with `ids` behind its own."""
        return Trajectory(
            [*self.tokens, *ids],
            [*self.is_sampled, *[sampled] * len(ids)],
            [*self.logprobs, *(logprobs if logprobs is not None else [None] * len(ids))],
        )


class _Turn(NamedTuple):
    messages: tuple[Message, ...]  # what was said to the model
    answer_at: int  # where its answer begins among the tokens
    answer: Message


@dataclass(slots=True)
class Conversation:
    """Hold the turns of one dialogue with a model, and sample the next.

    `drift` counts the turns after which encoding the conversation anew would have given other tokens: how often
    the usual way would have trained on tokens that were never sampled. `max_context`: with it, the oldest turns are
    dropped whenever a prompt and its `max_tokens` would be longer.

    >>> import asyncio
    >>> from myserve.sdk import DeploymentSampler
    >>> from myserve.sdk.testing import ScriptedTransport, ToyTokenizer
    >>> sampler = DeploymentSampler("http://test", "toy", tokenizer=ToyTokenizer(),
    ...     transport=ScriptedTransport(["4"]))
    >>> talk = Conversation(sampler, [{"role": "system", "content": "Be brief."}])
    >>> asyncio.run(talk.say("2+2=")).text, asyncio.run(talk.say("Sure?")).text
    ('4', '4')
    >>> sum(talk.trajectory().is_sampled)
    2
    """

    sampler: TurnSampler
    # before the first turn; a truncation keeps it
    preamble: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    max_context: int | None = None  # tokens
    drift: int = field(default=0, init=False)
    _turns: list[_Turn] = field(default_factory=list, init=False)
    _now: Trajectory = field(default_factory=Trajectory, init=False)
    _ended: list[Trajectory] = field(default_factory=list, init=False)

    @property
    def tokens(self) -> list[int]:
        """Return the model's context: the last prompt and its answer."""
        return self._now.tokens

    @property
    def messages(self) -> list[Message]:
        """Return the conversation as messages."""
        return [*self.preamble, *(m for turn in self._turns for m in (*turn.messages, turn.answer))]

    async def say(self, content: str, **options: Any) -> SampledCompletion:
        """Return the answer to a user's message; `options` are `SampleOptions` (n stays 1). Raises as `answer` does."""
        return await self.answer([{"role": "user", "content": content}], **options)

    async def answer(self, messages: Sequence[Message], **options: Any) -> SampledCompletion:
        """Return the answer to any messages: a user's, a tool's results. A turn that fails changes nothing.

        Raises ValueError for `n`, for a template that drops earlier answers, and for a prompt or an answer that
        `max_seq_len` keeps out; `SamplingError` as the sampler does.
        """
        if "n" in options:
            raise ValueError("a conversation has one next answer; n belongs to sample_with_tokens")
        then = self._with_room_for(messages, options.get("max_tokens", DEFAULT_MAX_TOKENS))
        prompt = then._now.extended(then._rendered(messages), sampled=False)
        completions = await self.sampler.sample_with_prompt_tokens(prompt.tokens, **options)
        if completions.failures:
            raise completions.failures[0]  # also with on_error="keep": a turn without an answer is no turn
        if not completions:
            raise ValueError("the conversation, with this answer, is longer than max_seq_len")
        (completion,) = completions
        answer = {"role": "assistant", "content": completion.text}
        self._turns = [*then._turns, _Turn(tuple(messages), len(prompt.tokens), answer)]
        self._now = prompt.extended(completion.completion_tokens, completion.inference_logprobs, sampled=True)
        self._ended = then._ended
        self.drift += self._encoded_anew() != self.tokens
        return completion

    def trajectory(self) -> Trajectory:
        """Return the conversation since the last truncation, as one training sample."""
        return self._now

    def trajectories(self) -> list[Trajectory]:
        """Return every training sample of the conversation: one, and one more for each truncation."""
        return [*self._ended, self._now]

    def truncate(self, keep: int) -> None:
        """Forget all but the last `keep` turns (what was said, and the answer); the preamble stays.

        The answers kept are the tokens that were sampled; what was said before the first of them is rendered again.
        Fewer are kept where the first would be a tool's result, for the call that it answers is gone.
        """
        if keep >= len(self._turns):
            return
        kept = self._turns[len(self._turns) - keep :]
        while kept and kept[0].messages[0].get("role") == "tool":
            kept = kept[1:]
        opening = self._opening(kept[0].messages) if kept else []
        shift = len(opening) - kept[0].answer_at if kept else 0
        rest = self.tokens[kept[0].answer_at :] if kept else []
        if any(self._now.is_sampled):
            self._ended = [*self._ended, self._now]
        self._now = Trajectory().extended([*opening, *rest], sampled=False)
        self._turns = [turn._replace(answer_at=turn.answer_at + shift) for turn in kept]

    def _with_room_for(self, messages: Sequence[Message], max_tokens: int) -> Conversation:
        """Return a copy of this conversation, without its oldest turns where there is no room for them."""
        then = replace(self)
        then._turns, then._now, then._ended = self._turns, self._now, self._ended
        if self.max_context is not None:
            while (
                then._turns
                and len(then.tokens) + len(then._rendered(messages)) + max_tokens > self.max_context
            ):
                then.truncate(len(then._turns) - 1)
        return then

    def _opening(self, messages: Sequence[Message]) -> list[int]:
        return as_token_ids(self._template([*self.preamble, *messages], tokenize=True))

    def _rendered(self, new: Sequence[Message]) -> list[int]:
        """Return the ids from the end of the last answer to the start of the next one."""
        if not self.tokens:
            return self._opening(new)
        text = str(self._template([*self._history_with_mark(), *new], tokenize=False))
        _, mark, suffix = text.rpartition(_MARK)
        if not mark:
            raise ValueError(
                "the chat template drops earlier answers: a conversation cannot go on from its tokens"
            )
        ids = as_token_ids(self.sampler.tokenizer.encode(suffix, add_special_tokens=False))
        # The template closes an answer with the token that the model ended it with, unless it ran out of length.
        return ids[1:] if ids[:1] == self.tokens[-1:] else ids

    def _history_with_mark(self) -> list[Message]:
        messages = self.messages
        return [*messages[:-1], {**messages[-1], "content": _MARK}]

    def _encoded_anew(self) -> list[int]:
        """Return the ids of the whole conversation encoded anew, up to the end of the last answer."""
        text = str(self._template([*self._history_with_mark()], tokenize=False, add_generation_prompt=False))
        text = text[: text.rindex(_MARK)] + str(self._turns[-1].answer["content"])
        ids = as_token_ids(self.sampler.tokenizer.encode(text, add_special_tokens=False))
        ended = self.tokens[-1:] == [getattr(self.sampler.tokenizer, "eos_token_id", None)]
        return [*ids, self.tokens[-1]] if ended else ids

    def _template(self, messages: Sequence[Message], **how: Any) -> Any:
        how = {"add_generation_prompt": True, **how}
        how |= {} if self.tools is None else {"tools": self.tools}
        return self.sampler.tokenizer.apply_chat_template(list(messages), **how)
