"""The request fields that chat and completions share. None: not sent; defaults are decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from myserve.wire.base import WireModel
from myserve.wire.structured import Choices, ResponseFormat, Schema, StructuredOutputs

TokenIds = Annotated[tuple[int, ...], Field(fail_fast=True)]

# Accepted everywhere and without effect on the answer: they steer billing, abuse tracking or cache placement
# at a provider, and clients send them by habit.
HINTS = frozenset(
    {
        "user",
        "safety_identifier",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
    }
)

# Known to us and not supported: name -> the values that ask for nothing, which pass. Anything else is refused
# by name, because an answer that ignores what was asked looks like one that does not.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "routing_matrix_format": ("base64_inline",),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
}


class StreamOptions(WireModel):
    include_usage: bool | None = None


class SamplingFields(WireModel):
    """What one may say about the draw, on any route. Ranges are `SamplingParams`' to check."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    # length and stopping
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    # constraints
    allowed_token_ids: TokenIds | None = None
    bad_words: tuple[str, ...] | None = None
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
    logit_bias: dict[str, float] | None = None
    # penalties
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    # the shape of the distribution
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    # the draw
    seed: int | None = None
    noise: Literal["counter", "torch"] | None = None
    sample_index: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # of the first choice
    num_prior_tokens: Annotated[int, Field(ge=0)] | None = None  # the prompt's last ids: sampled before
    # what is reported
    top_logprobs: int | None = None
    logprobs_mode: Literal["raw", "processed"] | None = None
    logprob_token_ids: TokenIds | None = None
    kept: bool | None = None
    prompt_logprobs: int | None = None
    include_routing_matrix: bool | None = None


class GenerationRequest(SamplingFields):
    """What one may say about a generation, whatever its prompt."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = UNSUPPORTED

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: str | None = None
    # seconds for the answer
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    stream_interval: Annotated[int, Field(ge=1)] | None = None  # tokens a chunk
    token_arrays: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    raw_output: bool | None = None
    perf_metrics_in_response: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)
