"""torch's generator on a CPU, moved on as if it had drawn: its state is the Mersenne Twister's, as bytes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from myserve.core.mersenne.jump import WORDS, block_ahead

__all__ = ["skip_exponentials", "skip_words"]

# at::CPUGeneratorImplState, and of it what at::mt19937 holds: how many words are left, which is next, the words
_BYTES = 5056
_LEFT, _NEXT, _STATE = 8, 16, 24
_WORDS_OF_ONE = 2  # of a float32 exponential: 64 bits are drawn for it


def skip_exponentials(generator: torch.Generator, count: int, size: int) -> bool:
    """Move on as `count` calls of `exponential_` on float32 [size] would. False, and nothing done, where torch's own
    way of drawing them is not the one that is known here."""
    if generator.device.type != "cpu" or not _draws_two_words_each(size):
        return False
    skip_words(generator, _WORDS_OF_ONE * count * size)
    return True


@lru_cache(maxsize=16)
def _draws_two_words_each(size: int) -> bool:
    """Return whether exponentials take two words each here: builds with MKL's generators, and others, need not."""
    drawn, counted = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    if len(drawn.get_state()) != _BYTES:
        return False
    torch.empty(size, dtype=torch.float32).exponential_(generator=drawn)
    skip_words(counted, _WORDS_OF_ONE * size)
    return torch.equal(drawn.get_state(), counted.get_state())


def skip_words(generator: torch.Generator, count: int) -> None:
    """Move a generator of the CPU on by a number of 32-bit words.

    >>> one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    >>> _ = torch.empty(5000, dtype=torch.int32).random_(generator=one)
    >>> skip_words(other, 5000)
    >>> torch.equal(one.get_state(), other.get_state())
    True
    """
    if count == 0:
        return
    state = generator.get_state().numpy().copy()  # uint8 [5056]
    left, at = state[_LEFT : _LEFT + 4].view(np.int32), state[_NEXT : _NEXT + 8].view(np.uint64)
    words = state[_STATE : _STATE + 8 * WORDS].view(np.uint64)
    # a block that is used up is made anew with the next word, not before; a new generator begins with such a one
    place = (WORDS if left[0] == 1 else int(at[0])) + count
    blocks, after = (place - 1) // WORDS, (place - 1) % WORDS + 1
    words[:] = block_ahead(words.astype(np.uint32), blocks)
    left[0], at[0] = WORDS + 1 - after, after
    generator.set_state(torch.from_numpy(state))
