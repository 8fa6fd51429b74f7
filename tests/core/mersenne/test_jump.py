"""A jump of the Mersenne Twister lands where numpy's own generator arrives word by word."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from myserve.core.mersenne import jump
from myserve.core.mersenne.jump import WORDS, block_ahead


def block_of(generator: np.random.MT19937) -> NDArray[np.uint32]:
    return np.asarray(generator.state["state"]["key"], dtype=np.uint32)


@pytest.mark.parametrize("blocks", [0, 1, 2, 31, 32, 33, 1000, 4097])
def test_a_jump_is_so_many_blocks(blocks: int) -> None:
    generator = np.random.MT19937(7)
    generator.random_raw(1)  # the first block
    first = block_of(generator)
    generator.random_raw(WORDS * blocks)
    assert (block_ahead(first, blocks) == block_of(generator)).all()


def test_two_jumps_are_one() -> None:
    first = block_of(np.random.MT19937(1))
    far = 14_611_538
    assert (block_ahead(block_ahead(first, far), 77) == block_ahead(first, far + 77)).all()


def test_control_with_another_polynomial_it_lands_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    first = block_of(np.random.MT19937(1))
    right = block_ahead(first, 1001)
    jump._power_of_x.cache_clear()
    terms = jump._lower_terms()
    monkeypatch.setattr(jump, "_lower_terms", lambda: terms[1:])
    assert (block_ahead(first, 1001) != right).any()
    jump._power_of_x.cache_clear()
