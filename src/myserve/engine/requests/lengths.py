"""The tokens that a request may draw, by the context that its prompt leaves. No torch, for routes import it."""

from __future__ import annotations

from myserve.errors import ContextLengthError

__all__ = ["checked_max_tokens"]


def checked_max_tokens(num_prompt_tokens: int, asked: int | None, max_model_len: int) -> int:
    """Return how many tokens may be drawn: what was asked, or the rest of the context.

    A prompt that is only scored (`asked` 0) may fill the context.
    """
    room = max_model_len - num_prompt_tokens
    if room < (0 if asked == 0 else 1):
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, and this model's maximum context length is {max_model_len} "
            "tokens; shorten the prompt so that at least one token fits",
            param="prompt",
        )
    if asked is not None and asked > room:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {asked}, and this model's maximum context "
            f"length is {max_model_len} tokens; ask for at most {room}, or leave max_tokens out",
            param="max_tokens",
        )
    return room if asked is None else asked
