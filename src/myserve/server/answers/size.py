"""An answer's bytes are counted before it is written: too large is refused, large is written in a thread."""

from __future__ import annotations

from collections.abc import Sequence

from myserve.core.params import SamplingParams
from myserve.engine.outputs import Delta, PromptLogprob, TokenOutput
from myserve.errors import RequestError

__all__ = ["CHOICE", "MAX_ANSWER_BYTES", "check_known_size", "check_size", "delta_size"]

MAX_ANSWER_BYTES = 64 << 20

# Bytes of JSON, as measured.
CHOICE = 200  # without its tokens
ENTRY = 200  # of a token
ALTERNATIVE = 100  # in OpenAI's form
RANKED = 75  # an alternative of a prompt's token, in vLLM's form
ID_LOGPROB = 45
KEPT_ID = 7


def check_known_size(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    n: int,
    vocab_size: int,
    max_model_len: int,
) -> None:
    """Raise RequestError for an answer of which it is known before the first token that it is too large.

    Known are a prompt's scores, which are on every choice, and the support of draws that nothing truncates.
    """
    scores = supports = 0
    for prompt, wanted in zip(prompts, params, strict=True):
        if wanted.prompt_logprobs is not None:
            scores += n * len(prompt) * (1 + wanted.prompt_logprobs) * RANKED
        if wanted.kept:
            steps = wanted.max_tokens or max_model_len - len(prompt)
            supports += n * steps * _certain_support(wanted, vocab_size) * KEPT_ID
    if scores > MAX_ANSWER_BYTES:
        raise _too_large(
            scores, "prompt_logprobs", "ask for fewer alternatives, or score fewer tokens at once"
        )
    if supports > MAX_ANSWER_BYTES:
        raise _too_large(
            supports, "kept", "truncate the distribution (top_k, top_p, min_p), or ask for fewer tokens"
        )


def _certain_support(params: SamplingParams, vocab_size: int) -> int:
    """Return how many tokens each draw keeps at least: all, unless something may take tokens away."""
    # each number is at its "off" value
    free = params.top_p == 1 and params.min_p == 0 and params.typical_p == 1 and params.top_n_sigma is None
    if not free or params.grammar is not None or params.temperature == 0:
        return 1
    kept = vocab_size if params.allowed_token_ids is None else len(set(params.allowed_token_ids))
    return min(kept, params.top_k) if params.top_k and params.top_k > 0 else kept


def delta_size(delta: Delta) -> int:
    """Return about how many bytes a delta is on the wire, if all that it has is written."""
    size = len(delta.text) + sum(map(_token_size, delta.tokens)) + sum(map(_token_size, delta.stop_tokens))
    return size + sum(_prompt_token_size(token) for token in delta.prompt_logprobs or ())


def _token_size(token: TokenOutput) -> int:
    size = ENTRY + ALTERNATIVE * len(token.top_logprobs) + ID_LOGPROB * len(token.token_id_logprobs)
    if token.kept is not None:
        size += KEPT_ID * len(token.kept.token_ids)
    return size + 2 * len(token.routed_experts or b"")


def _prompt_token_size(token: PromptLogprob) -> int:
    return (
        RANKED * (1 + len(token.top_logprobs))
        + ID_LOGPROB * len(token.token_id_logprobs)
        + 2 * len(token.routed_experts or b"")
    )


def check_size(num_bytes: int, num_tokens: int, advice: str = "") -> None:
    """Raise RequestError when an answer that is made as a whole has grown past what one answer may have."""
    if num_bytes > MAX_ANSWER_BYTES:
        advice = advice or "ask for fewer alternatives or choices, or stream it"
        raise _too_large(num_bytes, None, f"{advice} ({num_tokens} tokens came)")


def _too_large(num_bytes: int, param: str | None, advice: str) -> RequestError:
    return RequestError(
        f"the answer has {num_bytes >> 20} MiB, and {MAX_ANSWER_BYTES >> 20} MiB are the limit; {advice}",
        param=param,
        code="answer_too_large",
    )
