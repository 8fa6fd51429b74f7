"""Rows and references that the core's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from myserve.core import sampling, stages
from myserve.core.compiled import fast_path
from myserve.core.noise import OPENED
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState

VOCAB_SIZE = 131  # no multiple of the noise's blocks, nor of a vector register

MakeRow = Callable[..., RowState]


@pytest.fixture
def make_row() -> MakeRow:
    """A RowState of keyword arguments: SamplingParams' own, and `index`, `prompt`, `completion`, `vocab`, `eos`."""

    def make(
        *,
        seed: int = 0,
        index: int = 0,
        prompt: Sequence[int] = (1, 2, 3),
        completion: Sequence[int] = (),
        vocab: int = VOCAB_SIZE,
        eos: Sequence[int] = (0,),
        **params: object,
    ) -> RowState:
        return RowState(
            SamplingParams(**params),  # type: ignore[arg-type]  # the tests' own keyword arguments
            seed=seed,
            sample_index=index,
            prompt_token_ids=prompt,
            completion_token_ids=completion,
            vocab_size=vocab,
            eos_token_ids=eos,
        )

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for these small tensors: two spend their time waiting for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread: None) -> None:
    """Torch on two threads, where `sum` and `logsumexp` are known to change with the batch."""
    torch.set_num_threads(2)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that no code is compiled for and that is better not asked for numbers."""
    monkeypatch.setattr(fast_path, "covers", lambda scores: False)
    monkeypatch.setattr(stages, "nucleus_edge", stages.nucleus_edge_without_sync)
    monkeypatch.setattr(sampling, "openings", lambda device: (OPENED, None))
