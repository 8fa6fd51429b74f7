"""Every sampling parameter, validated once, here. What passes is never clamped or reinterpreted later."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from myserve.core.grammar import Grammar, Reasoning
from myserve.core.ranges import MAX_ID, MAX_TOKENS, Range, check_ranges, ranged, ranges_of, shown
from myserve.core.waterfall import WaterfallOptions
from myserve.errors import RequestError

__all__ = ["SamplingParams"]

T = TypeVar("T")

NoiseKind = Literal["counter", "torch"]
LogprobsMode = Literal["raw", "processed"]

MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 1024  # the server's routes have OpenAI's own, smaller limits
MAX_LOGIT_BIAS = 100.0

_SWITCHES = (
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "kept",
    "routed_experts",
    "ranks",
    "entropies",
)
_TOKEN_ID = Range(0, MAX_ID)
_FINITE = Range(-sys.float_info.max, sys.float_info.max)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Hold the sampling parameters of one completion: frozen, and nothing that did not pass validation.

    Token ids are checked here for being ids at all, and against the model's vocabulary when a request meets
    its model (`check_vocabulary`). Raises `RequestError` with the field, the value and the range.

    >>> SamplingParams(temperature=0.7, top_p=0.9).top_k is None
    True
    >>> SamplingParams(top_p=1.5)
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: top_p must be in [0, 1], got 1.5
    """

    # -- length and stopping --
    max_tokens: int | None = ranged(None, 0, MAX_TOKENS)
    """How many tokens may be drawn; None: up to the end of the model's context. 0, which needs `prompt_logprobs`: the
    prompt is scored and nothing is drawn."""
    min_tokens: int = ranged(0, 0, MAX_TOKENS)
    """Until so many tokens are out, EOS and stop ids cannot be drawn; 0 <= min_tokens <= max_tokens."""
    stop: tuple[str, ...] = ()
    """At most 16 non-empty strings; the first to appear in the text ends it."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the completion as EOS does."""
    ignore_eos: bool = False
    """EOS is then a token like any other."""
    include_stop_str_in_output: bool = False
    """Keep the matched stop string, or stop token, in the output."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text (never out of the ids)."""
    shown_special_ids: tuple[int, ...] = ()
    """Special tokens that the text has all the same."""
    # -- constraints --
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these can be drawn; None: all."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids that may not be completed, within the prompt's end and the completion together."""
    grammar: Grammar | None = None
    """What the text must be, from its first token to its EOS; None: anything."""
    reasoning: Reasoning | None = None
    """A part before the text that the grammar does not see, and its budget; None: there is none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits by id; values beyond [-100, 100] count as the nearer end, as OpenAI documents."""
    # -- penalties --
    repetition_penalty: float = ranged(1.0, 1e-6, 100.0)
    """In [1e-6, 100]; over the ids of prompt and completion: z > 0 becomes z / r, else z * r. 1: off."""
    frequency_penalty: float = ranged(0.0, -2.0, 2.0)
    """In [-2, 2]; f times a token's count in the completion is subtracted from its logit."""
    presence_penalty: float = ranged(0.0, -2.0, 2.0)
    """In [-2, 2]; subtracted once from every token that the completion has."""
    # -- the shape of the distribution --
    temperature: float = ranged(1.0, 0.0, 100.0)
    """In [0, 100]; 0: the most likely token, the lowest id among equals, no randomness."""
    top_k: int | None = ranged(None, -1, 2**31 - 1)
    """Keep the tokens that are no less likely than the k-th; None, 0, -1: off. In [-1, 2**31)."""
    top_p: float = ranged(1.0, 0.0, 1.0)
    """In [0, 1]; keep the smallest set of likeliest tokens with at least this mass. 1: off; 0: one token."""
    min_p: float = ranged(0.0, 0.0, 1.0)
    """In [0, 1]; keep tokens at least min_p times as likely as the likeliest. 0: off."""
    typical_p: float = ranged(1.0, 0.0, 1.0, open_low=True)
    """In (0, 1]; keep the tokens whose surprise is nearest the entropy, up to this mass. 1: off."""
    top_n_sigma: float | None = ranged(None, 0.0, 1e6, open_low=True)
    """In (0, 1e6]; keep tokens whose logit is within so many standard deviations of the largest that the stages
    before have left. None: off."""
    # -- the draw --
    seed: int | None = ranged(None, -(2**63), 2**64 - 1)
    """In [-2**63, 2**64), taken modulo 2**64; None: the engine draws one and reports it."""
    noise: NoiseKind = "counter"
    """"counter": a pure function of seed, sample index, position and id. "torch": transformers' stream."""
    # -- what is reported --
    top_logprobs: int = ranged(0, 0, MAX_TOP_LOGPROBS)
    """How many alternatives to report with every token, 0 to 1024."""
    logprobs_mode: LogprobsMode = "raw"
    """Alternatives from the model's own distribution ("raw") or from the one drawn from ("processed")."""
    logprob_token_ids: tuple[int, ...] = ()
    """Ids whose logprob is reported at every position, whatever is drawn."""
    kept: bool = False
    """Report the support of every draw, with its mass and the entropy."""
    routed_experts: bool = False
    """Report which experts of a mixture each token's forward pass used; with `prompt_logprobs`, the prompt's too."""
    ranks: bool = False
    """Report the rank of each token among all ids by the model's own scores, 1 the likeliest."""
    entropies: bool = False
    """Report the entropy, in nats, of the model's own distribution at each token."""
    waterfall: WaterfallOptions | None = None
    """Report the distribution of one token after every stage, and the race that chose it; None: do not."""
    prompt_logprobs: int | None = ranged(None, 0, MAX_TOP_LOGPROBS)
    """Report the prompt's logprobs with so many alternatives, 0 to 1024; None: do not."""
    prompt_logprob_start: int = ranged(0, 0, MAX_TOKENS)
    """With `prompt_logprobs`: the first position whose next token is scored; fewer than the prompt has."""
    prompt_logprob_token_ids: tuple[tuple[int, ...], ...] = ()
    """With `prompt_logprobs`: ids whose logprob is reported with each token that is scored: one row for all, or one for
    each, equally long."""

    # The largest id that each field names, counted once: lists may have 100,000 ids, and a request 4,096 prompts.
    _largest_ids: tuple[tuple[str, int], ...] = field(init=False, repr=False, compare=False)
    _derived: dict[object, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError(
                f"max_tokens must be in [1, {MAX_TOKENS}], got 0; only to score a prompt (prompt_logprobs) may it be 0",
                param="max_tokens",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be in [0, {self.max_tokens}], which is max_tokens, got {self.min_tokens}",
                param="min_tokens",
            )
        _check_stop(self.stop)
        _ids("stop_token_ids", self.stop_token_ids)
        _ids("shown_special_ids", self.shown_special_ids)
        if self.allowed_token_ids is not None:
            _ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError(
                    "allowed_token_ids must name at least one id, got none", param="allowed_token_ids"
                )
        for name in _SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {value!r:.80}", param=name)
        for word in self.bad_words_ids:
            _ids("bad_words_ids", word)
            if not word:
                raise RequestError("bad_words_ids must not hold an empty sequence", param="bad_words_ids")
        _instance("grammar", self.grammar, Grammar)
        _instance("reasoning", self.reasoning, Reasoning)
        _instance("waterfall", self.waterfall, WaterfallOptions)
        if self.grammar is not None and self.ignore_eos:
            raise RequestError(
                "ignore_eos cannot be had with a grammar: the grammar says where the text ends",
                param="ignore_eos",
            )
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        _one_of("noise", self.noise, ("counter", "torch"))
        _one_of("logprobs_mode", self.logprobs_mode, ("raw", "processed"))
        _ids("logprob_token_ids", self.logprob_token_ids)
        for row in self.prompt_logprob_token_ids:
            _ids("prompt_logprob_token_ids", row)
        if len({len(row) for row in self.prompt_logprob_token_ids}) > 1:
            raise RequestError(
                "prompt_logprob_token_ids must have rows of one length", param="prompt_logprob_token_ids"
            )
        object.__setattr__(self, "_largest_ids", tuple(self._find_largest_ids()))
        object.__setattr__(self, "_derived", {})

    def with_seed(self, seed: int | None) -> SamplingParams:
        """Return these parameters with another seed; the rest, which was checked, is not checked again.

        >>> SamplingParams(seed=1, top_k=5).with_seed(2) == SamplingParams(seed=2, top_k=5)
        True
        """
        if seed is not None:
            ranges_of(SamplingParams)["seed"].check("seed", seed)
        copied = copy(self)
        object.__setattr__(copied, "seed", seed)
        return copied

    def derived(self, key: object, make: Callable[[], T]) -> T:
        """Return `make()`, which depends on nothing but these parameters and `key`; made once, and kept.

        A request's choices and prompts share it: a list of 100,000 ids is not read again for each of them at each step.
        """
        if key not in self._derived:
            self._derived[key] = make()
        made: T = self._derived[key]
        return made

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `RequestError` for an id that a model of `vocab_size` tokens does not have.

        >>> SamplingParams(logit_bias={7: 1.0}).check_vocabulary(4)
        Traceback (most recent call last):
        ...
        myserve.errors.RequestError: logit_bias names token id 7; the model's ids are 0 to 3
        """
        for name, worst in self._largest_ids:
            if worst >= vocab_size:
                raise RequestError(
                    f"{name} names token id {worst}; the model's ids are 0 to {vocab_size - 1}", param=name
                )

    def _find_largest_ids(self) -> Iterable[tuple[str, int]]:
        yield "stop_token_ids", max(self.stop_token_ids, default=0)
        yield "allowed_token_ids", max(self.allowed_token_ids or (), default=0)
        yield "bad_words_ids", max(map(max, self.bad_words_ids), default=0)
        yield "logit_bias", max(self.logit_bias, default=0)
        yield "logprob_token_ids", max(self.logprob_token_ids, default=0)
        rows = (max(row, default=0) for row in self.prompt_logprob_token_ids)
        yield "prompt_logprob_token_ids", max(rows, default=0)


def _instance(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{name} must be a {kind.__name__}, got {value!r:.80}", param=name)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = " or ".join(repr(choice) for choice in choices)
        raise RequestError(f"{name} must be {listed}, got {value!r}", param=name)


def _ids(name: str, ids: tuple[int, ...]) -> None:
    if not isinstance(ids, tuple):
        raise RequestError(f"{name} must be a tuple of token ids, got {ids!r}", param=name)
    for token_id in ids:
        _TOKEN_ID.check(name, token_id)


def _check_stop(stop: tuple[str, ...]) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(text, str) for text in stop):
        raise RequestError(f"stop must be a tuple of strings, got {stop!r}", param="stop")
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(stop)}", param="stop"
        )
    if "" in stop:
        raise RequestError("stop must not hold an empty string: it would match before any text", param="stop")


def _checked_bias(bias: Mapping[int, float]) -> dict[int, float]:
    checked = {}
    for token_id, value in bias.items():
        _TOKEN_ID.check("logit_bias", token_id)
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in _FINITE:
            raise RequestError(
                f"logit_bias must map ids to finite numbers, got {shown(value)} for {token_id}",
                param="logit_bias",
            )
        checked[token_id] = min(max(float(value), -MAX_LOGIT_BIAS), MAX_LOGIT_BIAS)
    return checked
