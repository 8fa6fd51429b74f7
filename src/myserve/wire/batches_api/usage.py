"""Sums what a batch's answers have used: each protocol's own words for it become OpenAI's."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

__all__ = ["BatchUsage", "UsageSum"]


class CachedInput(TypedDict):
    cached_tokens: int


class ReasonedOutput(TypedDict):
    reasoning_tokens: int


class BatchUsage(TypedDict):
    """Tokens of all answers of a batch."""

    input_tokens: int
    input_tokens_details: CachedInput
    output_tokens: int
    output_tokens_details: ReasonedOutput
    total_tokens: int


class _AnyDetails(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    thinking_tokens: int | None = None


class _AnyUsage(msgspec.Struct):
    """The fields of all protocols: an answer has those of one."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    prompt_tokens_details: _AnyDetails | None = None
    completion_tokens_details: _AnyDetails | None = None
    input_tokens_details: _AnyDetails | None = None
    output_tokens_details: _AnyDetails | None = None


class _AnsweredBody(msgspec.Struct):
    usage: _AnyUsage | None = None
    meta_info: _AnyUsage | None = None  # SGLang's


class _AnsweredResponse(msgspec.Struct):
    body: _AnsweredBody | list[_AnsweredBody]


class _AnsweredLine(msgspec.Struct):
    response: _AnsweredResponse | None = None


_LINE = msgspec.json.Decoder(_AnsweredLine)


@dataclass(slots=True)
class UsageSum:
    """Sums the usage of answers, a line of the output each. An answer that tells none adds nothing.

    >>> used = UsageSum()
    >>> used.add(b'{"response": {"body": {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}}}')
    >>> anthropic = '{"input_tokens": 1, "cache_read_input_tokens": 4, "output_tokens": 1}'
    >>> used.add(f'{{"response": {{"body": {{"usage": {anthropic}}}}}}}'.encode())
    >>> used.told()["input_tokens"], used.told()["input_tokens_details"], used.told()["total_tokens"]
    (8, {'cached_tokens': 4}, 11)
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, line: bytes) -> None:
        """Take in one line of a batch's output."""
        response = _LINE.decode(line).response
        bodies = (
            [] if response is None else response.body if isinstance(response.body, list) else [response.body]
        )
        for body in bodies:
            used = body.usage or body.meta_info
            if used is not None:
                self._take(used)

    def _take(self, used: _AnyUsage) -> None:
        # Anthropic counts what was read from the cache beside the input
        cached = used.cache_read_input_tokens
        self.input_tokens += (
            used.prompt_tokens + used.input_tokens + used.cache_creation_input_tokens + cached
        )
        self.output_tokens += used.completion_tokens + used.output_tokens
        self.cached_tokens += cached + used.cached_tokens
        for details in (used.prompt_tokens_details, used.input_tokens_details):
            self.cached_tokens += (details and details.cached_tokens) or 0
        for details in (used.completion_tokens_details, used.output_tokens_details):
            if details is not None:
                self.reasoning_tokens += details.reasoning_tokens or details.thinking_tokens or 0

    def told(self) -> BatchUsage:
        """Return the sums in OpenAI's form."""
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }
