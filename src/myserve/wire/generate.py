"""Tokens in, tokens out: vLLM's `/inference/v1/generate`, which renderers, verifiers and prime-rl call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from myserve.wire.base import Integer, WireModel
from myserve.wire.completions import CompletionRequest
from myserve.wire.fields import SamplingFields, StreamOptions, TokenIds, check_stream_options
from myserve.wire.peers import REFUSED, Refused

__all__ = ["GenerateRequest", "GenerateSampling"]


class GenerateSampling(SamplingFields):
    """vLLM's `SamplingParams`, and ours. `logprobs`: so many alternatives of each token, 0 for the token alone."""

    REFUSED: ClassVar[Mapping[str, Refused]] = REFUSED
    # How vLLM stores and detokenizes inside itself; plugins' own words, which are answered in plain JSON.
    HINTS: ClassVar[frozenset[str]] = frozenset(
        {
            "detokenize",
            "flat_logprobs",
            "extra_args",
            "output_kind",
            "skip_clone",
        }
    )

    logprobs: Integer | None = None
    # the prompt's ids: the first position whose next token is scored, and ids that are scored with each
    prompt_logprob_start: Annotated[Integer, Field(ge=0)] | None = None
    prompt_logprob_token_ids: (
        TokenIds | Annotated[tuple[TokenIds, ...], Field(fail_fast=True, min_length=1)] | None
    ) = None

    @property
    def named_rows(self) -> tuple[tuple[int, ...], ...]:
        """Return the rows of ids: one for all scored tokens, or one for each."""
        ids: Any = self.prompt_logprob_token_ids or ()
        return (ids,) if ids and isinstance(ids[0], int) else ids


class GenerateRequest(WireModel):
    """`POST /inference/v1/generate`. Without a model, the first served one.

    >>> asked = GenerateRequest(token_ids=(5, 6), sampling_params=GenerateSampling(temperature=0.5, logprobs=1))
    >>> completion = asked.as_completion("m")
    >>> completion.prompts, completion.temperature, completion.logprobs
    ([(5, 6)], 0.5, 1)
    """

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **REFUSED,
        "features": Refused(),
        "content_parts": Refused(([],)),
    }
    # What vLLM's renderer says of its own work, beside the ids.
    HINTS: ClassVar[frozenset[str]] = frozenset({"assistant_tokens_mask", "token_offsets"})

    token_ids: Annotated[TokenIds, Field(min_length=1)]
    sampling_params: GenerateSampling
    model: str | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    priority: Integer | None = None
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    stream_interval: Annotated[Integer, Field(ge=1)] | None = None  # tokens a chunk
    token_arrays: bool | None = None
    return_token_ids: bool | None = None

    def check(self) -> None:
        """Raise RequestError for what no field alone is wrong about."""
        check_stream_options(self.stream, self.stream_options)

    def as_completion(self, model: str) -> CompletionRequest:
        """Return this request as the completions route knows it; tokens are named by their ids."""
        asked: dict[str, Any] = {
            name: getattr(self.sampling_params, name)
            for name in GenerateSampling.model_fields
            if name not in ("prompt_logprob_start", "prompt_logprob_token_ids")
        }
        return CompletionRequest(
            model=model,
            prompt=self.token_ids,
            stream=self.stream,
            stream_options=self.stream_options,
            cache_salt=self.cache_salt,
            priority=self.priority,
            request_timeout=self.request_timeout,
            stream_interval=self.stream_interval,
            token_arrays=self.token_arrays,
            return_tokens_as_token_ids=True,
            **asked,
        )
