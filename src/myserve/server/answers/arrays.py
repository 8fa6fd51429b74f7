"""A chunk's numbers in a few base64 strings, for training on millions of tokens whose text is not read."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence

from myserve.engine.outputs import PromptLogprob, TokenOutput
from myserve.wire.token_arrays import TokenArrays, encode_floats, encode_ints, encode_rows

__all__ = ["token_arrays"]


def token_arrays(echoed: Sequence[PromptLogprob], sampled: Sequence[TokenOutput], k: int) -> TokenArrays:
    """Return echoed prompt tokens, then sampled ones; with `k` > 0, so many alternatives of each.

    >>> token_arrays((), [TokenOutput(7, -0.5, -0.25)], 0)
    {'count': 1, 'token_id': 'BwAAAA==', 'logprob': 'AAAAvw==', 'sampling_logprob': 'AACAvg=='}
    """
    tokens: list[PromptLogprob | TokenOutput] = [*echoed, *sampled]
    arrays: TokenArrays = {
        "count": len(tokens),
        "token_id": encode_ints([token.token_id for token in tokens]),
        "logprob": encode_floats([math.nan if token.logprob is None else token.logprob for token in tokens]),
        "sampling_logprob": encode_floats(
            [math.nan] * len(echoed) + [token.sampling_logprob for token in sampled]
        ),
    }
    if k:
        rows = [[pair for pair in token.top_logprobs[:k] if math.isfinite(pair[1])] for token in tokens]
        arrays["top_token_id"], arrays["top_logprob"] = encode_rows(rows, k)
    if width := max((len(token.routed_experts or b"") for token in tokens), default=0):
        # Nothing was run before a prompt's first token, so it has no row: zeros keep the others in their places.
        routing = b"".join(token.routed_experts or bytes(width) for token in tokens)
        arrays["routing_matrix"] = b64encode(routing).decode()
    return arrays
