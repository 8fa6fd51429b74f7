"""Seeds: one run seed gives every (prompt, sample index) a seed of its own, whatever the order of the calls.

A server of ours takes `(seed, sample index)` as its noise key, so a group of samples needs one seed. Other
servers need one a sample: `index_seed`.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from itertools import chain

__all__ = ["MAX_SEED", "SEED_BITS", "index_seed", "prompt_seed", "random_seed"]

# 63 bits: every server that we know takes them (openai-python types an int64).
SEED_BITS = 63
MAX_SEED = (1 << SEED_BITS) - 1


def random_seed() -> int:
    """Return a seed for a call that has none: drawn by the client, so that a retry is the same sample."""
    return secrets.randbits(SEED_BITS)


def prompt_seed(run_seed: int, prompt_token_ids: Sequence[int], occurrence: int) -> int:
    """Return the seed of a prompt's samples: of the run, the prompt, and how often this prompt was asked before.

    >>> prompt_seed(7, [1, 2], 0) == prompt_seed(7, [1, 2], 0)
    True
    >>> len({prompt_seed(7, [1, 2], 0), prompt_seed(7, [1, 2], 1), prompt_seed(8, [1, 2], 0)})
    3
    """
    return _digest(b"prompt", chain((run_seed, occurrence), prompt_token_ids))


def index_seed(seed: int, index: int) -> int:
    """Return the seed of one sample, for a server that has no sample index. Index 0 keeps the seed as it is.

    `seed + index` was rejected: it makes (seed, 1) and (seed + 1, 0) the same sample.

    >>> index_seed(7, 0)
    7
    >>> index_seed(7, 1) != index_seed(8, 0)
    True
    """
    return seed if index == 0 else _digest(b"index", (seed, index))


def _digest(label: bytes, numbers: chain[int] | tuple[int, ...]) -> int:
    text = b",".join(str(number).encode() for number in numbers)
    digest = hashlib.blake2b(text, digest_size=8, person=label).digest()
    return int.from_bytes(digest, "big") >> (64 - SEED_BITS)
