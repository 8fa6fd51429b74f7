"""Every sampling parameter, validated once, here. What passes is never clamped or reinterpreted later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NoiseKind = Literal["counter", "torch"]
LogprobsMode = Literal["raw", "processed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one completion is drawn. (CONTRACT: the fields are fixed; docs and validation are the core's to write.)"""

    # length and stopping
    max_tokens: int | None = None  # None: to the end of the context
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    # constraints
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # bad_words, tokenized by who owns the tokenizer
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # penalties
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    # the shape of the distribution
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float | None = None
    # the draw
    seed: int | None = None  # None: the engine draws a random 64-bit one and reports it
    noise: NoiseKind = "counter"
    # what is reported
    top_logprobs: int = 0
    logprobs_mode: LogprobsMode = "raw"
    logprob_token_ids: tuple[int, ...] = ()
    kept: bool = False
    prompt_logprobs: int | None = None  # None: off; k: the k best alternatives beside each prompt token
