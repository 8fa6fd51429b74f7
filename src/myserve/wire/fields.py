"""The request fields that chat and completions share. None: not sent; defaults are decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from myserve.errors import RequestError
from myserve.wire.base import Integer, WireModel
from myserve.wire.peers import REFUSED, Refused
from myserve.wire.structured import Choices, ResponseFormat, Schema, StructuredOutputs

__all__ = [
    "MAX_MESSAGES",
    "MAX_STOP_STRINGS",
    "MAX_TOOLS",
    "GenerationRequest",
    "LogitBias",
    "SamplingFields",
    "StreamOptions",
    "TokenIds",
    "check_stream_options",
]

# How many of a thing one request may have. Validation stops at the first that is wrong or one too many, so what a
# body costs is bounded by its size; `docs/operations.md` has the table.
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 1024
MAX_TOOLS = 128  # OpenAI's own limit
MAX_MESSAGES = 16_384
MAX_LOGPROB_TOKEN_IDS = 1024

TokenIds = Annotated[tuple[int, ...], Field(fail_fast=True)]


def _checked_bias(value: Any) -> Any:
    """Stop at the first value that is no number: pydantic would complain about each of a million."""
    if isinstance(value, dict):
        for key, bias in value.items():
            if isinstance(bias, bool) or not isinstance(bias, int | float):
                raise ValueError(f"must map token ids to numbers, got {bias!r:.80} for {key[:40]!r}")
    return value


LogitBias = Annotated[dict[str, float], BeforeValidator(_checked_bias)]


class StreamOptions(WireModel):
    """Options of a stream beside its text. `continuous_usage_stats`: usage so far, on every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(WireModel):
    """The fields about a draw, on any route. Ranges are `SamplingParams`' to check."""

    n: Annotated[Integer, Field(ge=1, le=128)] | None = None
    # length and stopping
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    stop: str | Annotated[tuple[str, ...], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    # constraints
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[tuple[str, ...], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | None = None
    # the form of the text: one of these
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: Schema | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    logit_bias: LogitBias | None = None
    # penalties
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    # the shape of the distribution
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    # the draw
    seed: Integer | None = None
    noise: Literal["counter", "torch"] | None = None
    sample_index: Annotated[Integer, Field(ge=0, lt=2**31)] | None = None  # of the first choice
    num_prior_tokens: Annotated[Integer, Field(ge=0)] | None = None  # the prompt's last ids: sampled before
    counts_prior_tokens: bool | None = None  # max_tokens counts them too
    # what is reported
    top_logprobs: Integer | None = None
    logprobs_mode: Literal["raw", "processed"] | None = None
    logprob_token_ids: (
        Annotated[tuple[int, ...], Field(fail_fast=True, max_length=MAX_LOGPROB_TOKEN_IDS)] | None
    ) = None
    sampling_mask: bool | None = None
    kept: bool | None = None  # its alias
    token_stats: bool | None = None  # each entry has the token's rank and the model's entropy
    prompt_logprobs: Integer | None = None
    include_routing_matrix: bool | None = None


class GenerationRequest(SamplingFields):
    """The fields about a generation, whatever its prompt."""

    REFUSED: ClassVar[Mapping[str, Refused]] = REFUSED

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    # seconds for the answer
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    stream_interval: Annotated[Integer, Field(ge=1)] | None = None  # tokens a chunk
    token_arrays: bool | None = None
    # a stream's deltas have the logprobs too, as in the original specification
    delta_logprobs: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_drafters: bool | None = None  # of each token, what had drafted it before it was drawn
    raw_output: bool | None = None
    perf_metrics_in_response: bool | None = None

    @property
    def num_choices(self) -> int:
        """Return how many completions are asked for."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def includes_usage_so_far(self) -> bool:
        """Return whether every chunk has the usage up to it."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check(self) -> None:
        """Raise RequestError for what no field alone is wrong about."""
        check_stream_options(self.stream, self.stream_options)


def check_stream_options(stream: bool | None, options: StreamOptions | None) -> None:
    """Raise RequestError where options are given for a stream that was not asked for, as OpenAI does."""
    if options is not None and not stream:
        raise RequestError("stream_options is allowed with stream true only", param="stream_options")
