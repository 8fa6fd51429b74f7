"""A text that cannot fit the context is refused by its length, before all of it is tokenized."""

from __future__ import annotations

from collections.abc import Sequence

from myserve.engine.memory.available import free_host_memory
from myserve.errors import ContextLengthError, OverloadedError
from myserve.server.prompts.codec import Codec

__all__ = ["check_lengths", "check_memory"]

# A real text has 2 to 5 characters a token. One of eight times the context's length is tried by its beginning first.
TRIED_CHARACTERS_PER_TOKEN = 8
TRIED_FROM_CHARACTERS = 1 << 16
# A text's beginning alone may be cut into a few more tokens than as a part of the whole; this is far more than a few.
SLACK = 64

MEMORY_CHECKED_FROM_CHARACTERS = 1 << 20
BYTES_PER_CHARACTER = 256  # that tokenizing takes at its peak: measured 210


def check_lengths(texts: Sequence[str], codec: Codec, max_model_len: int, *, param: str) -> None:
    """Raise ContextLengthError when one of `texts` has more tokens than the context, as far as that is found cheaply.

    The first bound is the model's longest token times the context; tokenizers that drop characters, or fold unknown
    ones into one token, have no other. The second is the text's own beginning, tokenized. To be called off the event
    loop: it may tokenize eight characters for each token of the context.
    """
    for text in texts:
        if len(text) > max_model_len * codec.token_bytes.longest:
            raise ContextLengthError(
                f"a text of {len(text)} characters is longer than any {max_model_len} tokens of this model, whose "
                f"maximum context length is {max_model_len} tokens; shorten it",
                param=param,
            )
        head = max_model_len * TRIED_CHARACTERS_PER_TOKEN
        if len(text) > max(head, TRIED_FROM_CHARACTERS):
            num_tokens = len(codec.encode(text[:head]))
            if num_tokens > max_model_len + max_model_len // 8 + SLACK:
                raise ContextLengthError(
                    f"the first {head} of {len(text)} characters are {num_tokens} tokens already, and this model's "
                    f"maximum context length is {max_model_len} tokens; shorten the text",
                    param=param,
                )
        check_memory(len(text))


def check_memory(num_characters: int) -> None:
    """Raise OverloadedError where there is no memory now to tokenize so many characters at once."""
    if num_characters <= MEMORY_CHECKED_FROM_CHARACTERS:
        return
    if num_characters * BYTES_PER_CHARACTER > (free := free_host_memory()):
        raise OverloadedError(
            f"to tokenize {num_characters} characters takes more memory than the server has now, which has room for "
            f"{free // BYTES_PER_CHARACTER}",
            retry_after=5.0,
        )
