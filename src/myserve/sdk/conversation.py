"""A conversation over many turns in which no sampled token is ever encoded again.

The law: `tokens` only grows, so each prompt begins with the one before it and what was sampled after it. (Encoding
the whole conversation anew each turn was rejected: text that a model wrote rarely tokenizes back to the tokens
that it sampled, and a trainer then scores tokens that nobody drew.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from myserve.sdk.request import as_token_ids
from myserve.sdk.types import Completions, SampledCompletion

Message = Mapping[str, Any]
# Stands for an assistant's answer while a template is rendered around it; no template or model writes this.
_MARK = "answer-7c1f9e52"


class ChatTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def encode(self, text: str, **kwargs: Any) -> Any: ...


class Sampler(Protocol):
    """What is used of a `DeploymentSampler`."""

    @property
    def tokenizer(self) -> Any: ...
    async def sample_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], **options: Any
    ) -> Completions: ...


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One training sample: a whole conversation. All lists are as long as `tokens`."""

    tokens: list[int]
    is_sampled: list[bool]  # True where the model chose: what a loss is for
    logprobs: list[float | None]  # of the sampled tokens, where they were asked for


@dataclass(slots=True)
class Conversation:
    """Turns of one dialogue with a model.

    `drift` counts the turns after which encoding the conversation anew would have given other tokens: how often
    the usual way would have trained on tokens that were never sampled.

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

    sampler: Sampler
    messages: list[Message] = field(default_factory=list)
    tools: Sequence[Mapping[str, Any]] | None = None
    tokens: list[int] = field(default_factory=list, init=False)
    drift: int = field(default=0, init=False)
    _is_sampled: list[bool] = field(default_factory=list, init=False)
    _logprobs: list[float | None] = field(default_factory=list, init=False)

    async def say(self, content: str, **options: Any) -> SampledCompletion:
        """The answer to what the user says; `options` are `SampleOptions` (n stays 1)."""
        return await self.answer([{"role": "user", "content": content}], **options)

    async def answer(self, messages: Sequence[Message], **options: Any) -> SampledCompletion:
        """The answer to any messages: a user's, a tool's results. Raises before anything is changed."""
        if "n" in options:
            raise ValueError("a conversation has one next answer; n belongs to sample_with_tokens")
        prompt = [*self.tokens, *self._rendered(messages)]
        (completion,) = await self.sampler.sample_with_prompt_tokens(prompt, **options)
        self._extend(prompt[len(self.tokens) :], sampled=False)
        self._extend(completion.completion_tokens, sampled=True, logprobs=completion.inference_logprobs)
        self.messages += [*messages, {"role": "assistant", "content": completion.text}]
        self.drift += self._encoded_anew() != self.tokens[: len(prompt)] + completion.completion_tokens
        return completion

    def trajectory(self) -> Trajectory:
        """The conversation so far, as one training sample."""
        return Trajectory(list(self.tokens), list(self._is_sampled), list(self._logprobs))

    def _extend(self, ids: list[int], *, sampled: bool, logprobs: list[float] | None = None) -> None:
        self.tokens += ids
        self._is_sampled += [sampled] * len(ids)
        self._logprobs += logprobs if logprobs is not None else [None] * len(ids)

    def _rendered(self, new: Sequence[Message]) -> list[int]:
        """The ids from the end of the last answer to the start of the next one."""
        if not self.tokens:
            return as_token_ids(self._template([*self.messages, *new], tokenize=True))
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
        return [*self.messages[:-1], {**self.messages[-1], "content": _MARK}]

    def _encoded_anew(self) -> list[int]:
        """What the usual way makes of the conversation, up to the end of the last answer."""
        text = str(self._template([*self._history_with_mark()], tokenize=False, add_generation_prompt=False))
        text = text[: text.rindex(_MARK)] + str(self.messages[-1]["content"])
        ids = as_token_ids(self.sampler.tokenizer.encode(text, add_special_tokens=False))
        ended = self._is_sampled and self.tokens[-1:] == [
            getattr(self.sampler.tokenizer, "eos_token_id", None)
        ]
        return [*ids, self.tokens[-1]] if ended else ids

    def _template(self, messages: Sequence[Message], **how: Any) -> Any:
        how = {"add_generation_prompt": True, **how}
        how |= {} if self.tools is None else {"tools": self.tools}
        return self.sampler.tokenizer.apply_chat_template(list(messages), **how)
