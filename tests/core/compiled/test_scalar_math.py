"""The compiled twins have the bits of the tensor functions that define them."""

from __future__ import annotations

import numpy as np
import torch

from myserve.core import noise, numerics
from myserve.core.compiled import scalar_math


def test_exp_has_the_bits_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.cat(
        [-torch.rand(2000, generator=generator) * 100, torch.tensor([0.0, -87.0, -87.1, -torch.inf])]
    )
    ours = torch.tensor([float(scalar_math.exp(np.float32(number))) for number in x.tolist()])
    assert torch.equal(ours, numerics.exp(x))


def test_log_has_the_bits_of_its_definition_in_both_tails() -> None:
    v = torch.cat(
        [torch.rand(2000, dtype=torch.float64), torch.tensor([0.0, 2.0**-65, 1 - 2.0**-53]).double()]
    )
    ours = torch.tensor([scalar_math.neg_log1m(number) for number in v.tolist()], dtype=torch.float64)
    assert torch.equal(ours, numerics.neg_log1m(v))


def test_philox_and_the_uniform_have_the_bits_of_their_definition() -> None:
    words = torch.randint(0, 2**32, (200, 6), generator=torch.Generator().manual_seed(2))
    c0, c1, c2, c3, k0, k1 = words.unbind(1)
    theirs = noise.philox((c0, c1, c2, c3), (k0, k1))
    for row, expected in zip(
        words.numpy().astype(np.uint64),
        zip(*(word.tolist() for word in theirs[:3]), strict=True),
        strict=True,
    ):
        ours = scalar_math.philox(*row)
        assert tuple(int(word) for word in ours) == expected
        uniform = torch.tensor(scalar_math.uniform(ours[0], ours[1]), dtype=torch.float64)
        pair = tuple(torch.tensor(word) for word in expected)
        assert torch.equal(numerics.neg_log1m(uniform), noise.exponential(pair))
