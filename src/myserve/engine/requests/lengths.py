"""The tokens that a request may draw, by the context that its prompt leaves. No torch, for routes import it."""

from __future__ import annotations

from typing import NamedTuple

from myserve.errors import ContextLengthError

__all__ = ["OURS", "LengthFields", "checked_max_tokens"]


class LengthFields(NamedTuple):
    """Names of a request's prompt and of its limit, for errors in its own words."""

    prompt: str = "prompt"
    limit: str = "max_tokens"


OURS = LengthFields()


def checked_max_tokens(
    num_prompt_tokens: int, asked: int | None, max_model_len: int, fields: LengthFields = OURS
) -> int:
    """Return how many tokens may be drawn: what was asked, or the rest of the context. Raises ContextLengthError.

    A prompt that is only scored (`asked` 0) may fill the context.

    >>> checked_max_tokens(500, None, 512), checked_max_tokens(512, 0, 512)
    (12, 0)
    """
    room = max_model_len - num_prompt_tokens
    if room < (0 if asked == 0 else 1):
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, and this model's maximum context length is {max_model_len} "
            "tokens; shorten the prompt so that at least one token fits",
            param=fields.prompt,
        )
    if asked is not None and asked > room:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and {fields.limit} is {asked}, and this model's maximum "
            f"context length is {max_model_len} tokens; ask for at most {room}, or leave {fields.limit} out",
            param=fields.limit,
        )
    return room if asked is None else asked
