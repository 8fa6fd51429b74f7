"""The test of equal bits on two machines: the digest of a short fixed generation by the replica's own model."""

from __future__ import annotations

import hashlib
import struct

from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.outputs import Delta
from myserve.engine.requests.options import SubmitOptions

__all__ = ["digest_of", "probe"]

NUM_TOKENS = 24  # drawn; the prompt has as many
NUM_CHOICES = 2
TOP = 4  # alternatives of each token: their logprobs show more of the logits than the drawn one's


async def probe(engine: Engine) -> str:
    """Return the class of this machine's arithmetic, eight hexadecimal digits.

    Products, attention, norms and the output layer are the model's own, in a prefill and in decodes; noise and sampler
    draw from them, by rows alone and side by side. Equal digests mean equal tokens and equal bits of all logprobs.
    """
    length = min(NUM_TOKENS, engine.max_model_len // 4)
    prompt = [(7 + 31 * place) % engine.vocab_size for place in range(length)]
    params = SamplingParams(
        max_tokens=length, min_tokens=length, temperature=0.9, top_p=0.95, seed=20260, top_logprobs=TOP
    )
    stream = engine.submit(prompt, params, SubmitOptions(n=NUM_CHOICES, request_id="probe"))
    deltas: list[Delta] = []
    while more := await stream.next_deltas():
        deltas += more
    return digest_of(deltas)


def digest_of(deltas: list[Delta]) -> str:
    """Return a digest of every id and of the bits of every logprob, choice by choice. Raises the error of a choice."""
    digest = hashlib.blake2b(digest_size=4)
    for index in range(NUM_CHOICES):
        for delta in deltas:
            if delta.index != index:
                continue
            if delta.error is not None:
                raise delta.error
            for token in (*delta.tokens, *delta.stop_tokens):
                numbers = [
                    token.logprob,
                    token.sampling_logprob,
                    *(number for _, number in token.top_logprobs),
                ]
                ids = [token.token_id, *(token_id for token_id, _ in token.top_logprobs)]
                digest.update(struct.pack(f"<{len(ids)}q{len(numbers)}d", *ids, *numbers))
    return digest.hexdigest()
