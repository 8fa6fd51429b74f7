"""A request's fields become `SamplingParams`: names and forms change here, values never."""

from __future__ import annotations

import hashlib
from typing import Any

from myserve.core.params import SamplingParams
from myserve.errors import RequestError
from myserve.server.prompts.codec import Codec
from myserve.server.prompts.structured import grammar_of
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.fields import GenerationRequest
from myserve.wire.generate import GenerateRequest

__all__ = [
    "chat_params",
    "check_top_logprobs",
    "completion_params",
    "generate_params",
    "lists_tokens",
    "native_params",
    "seed_of_prompt",
    "tells_text_alone",
    "top_logprobs_of",
    "wants_logprobs",
    "work_of_params",
]

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat goes on to the end of the context

# Fields whose name and form are the same on both sides.
_SAME = (
    *("min_tokens", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    *("allowed_token_ids", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "seed", "noise"),
    *("logprobs_mode", "logprob_token_ids", "prompt_logprobs"),
)


def chat_params(request: ChatCompletionRequest, codec: Codec) -> SamplingParams:
    """Return what a chat request asks of the sampler.

    Raises `RequestError` for what no single field can be blamed for: two limits that differ, alternatives
    without logprobs.
    """
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise RequestError(
            f"max_tokens ({request.max_tokens}) and max_completion_tokens ({request.max_completion_tokens}) "
            "are one limit under two names: send one",
            param="max_completion_tokens",
        )
    return _params(request, codec, max_tokens=limits.pop() if limits else None)


def completion_params(request: CompletionRequest, codec: Codec, *, room: int) -> SamplingParams:
    """Return what a completion request asks of the sampler; see `scores_only` for `max_tokens` 0.

    `room` is what the context leaves to the longest prompt: a default never makes a request too long.
    """
    best_of, n = request.best_of, request.n or 1
    if best_of is not None and best_of != n:
        raise RequestError(f"best_of ({best_of}) other than n ({n}) is not supported", param="best_of")
    asked = {}
    if (request.echo or request.echo_last) and (lists_tokens(request) or request.token_arrays):
        asked["prompt_logprobs"] = max(top_logprobs_of(request), request.prompt_logprobs or 0)
    if scores_only(request):
        asked["prompt_logprobs"] = asked.get("prompt_logprobs", request.prompt_logprobs or 0)
    default = max(1, min(COMPLETION_MAX_TOKENS, room))
    limit = default if request.max_tokens is None else request.max_tokens
    return _params(request, codec, max_tokens=limit, **asked)


def generate_params(request: GenerateRequest, completion: CompletionRequest, codec: Codec) -> SamplingParams:
    """Return what the token route asks of the sampler: without a limit to the end of the context, as in vLLM.

    `completion`: the request as the completions route knows it.
    """
    sampling = request.sampling_params
    asked: dict[str, Any] = {}
    if sampling.prompt_logprob_start is not None:
        asked["prompt_logprob_start"] = sampling.prompt_logprob_start
    if sampling.named_rows:
        asked["prompt_logprob_token_ids"] = sampling.named_rows
    if completion.prompt_logprobs is None and (asked or completion.include_routing_matrix):
        # so that every position of the prompt is run; where only its experts are wanted, none is scored
        asked["prompt_logprobs"] = 0
        if not sampling.named_rows:
            asked.setdefault("prompt_logprob_start", len(request.token_ids) - 1)
    return _params(
        completion, codec, max_tokens=completion.max_tokens, ranks=wants_logprobs(completion), **asked
    )


def native_params(
    request: CompletionRequest, codec: Codec, *, max_tokens: int | None, **asked: Any
) -> SamplingParams:
    """Return what one prompt of SGLang's native route asks of the sampler.

    `asked`: parameters that no field of ours has.
    """
    return _params(request, codec, max_tokens=max_tokens, **asked)


def work_of_params(request: GenerationRequest) -> int:
    """Return what checking a request's parameters takes, in characters that are tokenized meanwhile."""
    words = request.bad_words or ()
    ids = (request.allowed_token_ids, request.stop_token_ids, request.logit_bias, request.logprob_token_ids)
    choices = (request.choice or (), request.guided_choice or ())
    return 2 * sum(32 + len(word) for word in words) + sum(len(each or ()) for each in (*ids, *choices)) // 4


def scores_only(request: CompletionRequest) -> bool:
    """`max_tokens` 0 with `echo` or `prompt_logprobs`: the prompt is scored, and that is all."""
    return request.max_tokens == 0 and bool(request.echo or request.prompt_logprobs is not None)


def wants_logprobs(request: GenerationRequest) -> bool:
    """`logprobs: 0` asks for the chosen tokens' logprobs, `false` for none; `token_arrays` has them instead."""
    asked = getattr(request, "logprobs", None)
    return asked is not None and asked is not False and not request.token_arrays


def lists_tokens(request: GenerationRequest) -> bool:
    """Return whether the answer has an entry for each token: routing stands there too, so it brings them."""
    return wants_logprobs(request) or bool(request.include_routing_matrix and not request.token_arrays)


def tells_text_alone(request: GenerationRequest) -> bool:
    """Return whether a stream's chunks, but for the first and the last, differ in their text alone."""
    asked = (request.return_token_ids, request.token_arrays, request.return_drafters)
    return not (lists_tokens(request) or any(asked) or request.includes_usage_so_far)


def seed_of_prompt(seed: int | None, position: int) -> int | None:
    """Return the seed of the prompt at `position` in one request's list.

    The first has the request's own. The others have theirs from it, so that a prompt that stands twice in a
    list is sampled twice; the choice says which seed it had.

    >>> seed_of_prompt(7, 0), seed_of_prompt(None, 3), seed_of_prompt(7, 1) == seed_of_prompt(8, 0)
    (7, None, False)
    """
    if seed is None or position == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest(), "little")


def _params(
    request: GenerationRequest, codec: Codec, *, max_tokens: int | None, **asked: Any
) -> SamplingParams:
    fields: dict[str, Any] = {name: getattr(request, name) for name in _SAME}
    fields["grammar"] = grammar_of(request)
    fields["ranks"] = fields["entropies"] = request.token_stats
    fields |= asked
    fields["max_tokens"] = max_tokens
    fields["kept"] = request.sampling_mask or request.kept
    fields["stop"] = (request.stop,) if isinstance(request.stop, str) else request.stop
    fields["top_logprobs"] = top_logprobs_of(request)
    fields["routed_experts"] = request.include_routing_matrix
    fields["logit_bias"] = None if request.logit_bias is None else _by_id(request.logit_bias)
    fields["bad_words_ids"] = None if request.bad_words is None else _bad_words(request.bad_words, codec)
    # null means "not sent", here as in OpenAI's API
    return SamplingParams(**{name: value for name, value in fields.items() if value is not None})


def top_logprobs_of(request: GenerationRequest) -> int:
    """Return how many alternatives beside each token; completions may have it in `logprobs` itself."""
    asked = getattr(request, "logprobs", None)
    legacy = asked if isinstance(asked, int) and not isinstance(asked, bool) else None
    if legacy is not None and request.top_logprobs not in (None, legacy):
        raise RequestError(
            f"logprobs ({legacy}) and top_logprobs ({request.top_logprobs}) ask for different numbers of "
            "alternatives: send one, or logprobs true",
            param="top_logprobs",
        )
    name, count = _alternatives_asked(request)
    if count < 0:
        raise RequestError(f"{name} must be at least 0, got {count}", param=name)
    return count


def check_top_logprobs(request: GenerationRequest, most: int) -> None:
    """Raise RequestError for more alternatives of a token than the operator allows (`--max-logprobs`)."""
    name, count = _alternatives_asked(request)
    if not 0 <= count <= most:
        raise RequestError(f"{name} must be in [0, {most}], got {count}", param=name)


def _alternatives_asked(request: GenerationRequest) -> tuple[str, int]:
    """Return how many alternatives are asked for, and by which field."""
    asked = getattr(request, "logprobs", None)
    if isinstance(asked, int) and not isinstance(asked, bool):
        return "logprobs", asked
    return "top_logprobs", request.top_logprobs or 0


def _by_id(bias: dict[str, float]) -> dict[int, float]:
    """Return the bias by id: JSON's keys are strings, and these must be token ids."""
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise RequestError(f"logit_bias: keys must be token ids, got {key[:40]!r}", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def _bad_words(words: tuple[str, ...], codec: Codec) -> tuple[tuple[int, ...], ...]:
    """Return the ids of each word at the start of a text and after a space: these are different tokens."""
    if "" in words:
        raise RequestError("bad_words must not hold an empty string", param="bad_words")
    spellings = (
        codec.encode(space + word, add_special_tokens=False) for word in words for space in ("", " ")
    )
    return tuple(dict.fromkeys(tuple(ids) for ids in spellings if ids))
