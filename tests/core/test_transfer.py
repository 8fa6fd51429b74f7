"""What the tensor path asks a device for: one transfer a step, whatever the rows ask for and however many they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from myserve.core import sampling
from myserve.core.rows import RowState
from myserve.core.sampling import Sampled, Sampler
from myserve.core.transfer import download

MakeRow = Callable[..., RowState]
VOCAB = 20_011
ASKS: list[dict[str, object]] = [
    {},
    {"temperature": 0.0, "top_logprobs": 3, "logprobs_mode": "processed"},
    {"top_k": 7, "top_logprobs": 5},
    {"top_p": 0.9, "kept": True},
    {"min_p": 0.05, "temperature": 0.7},
    {"typical_p": 0.6},
    {"top_n_sigma": 1.5},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"logit_bias": {5: 3.0}, "logprob_token_ids": (5, 90, 0)},
    {"allowed_token_ids": (3, 64, 65, 130), "min_tokens": 2},
    {"noise": "torch"},
]


class Bits:
    """A grammar that allows every other token."""

    error = None
    closes_early = ends = False

    def mask(self) -> Tensor:
        return torch.full((-(-VOCAB // 32),), 0x55555555, dtype=torch.int32)

    def prepare(self) -> None: ...

    def append(self, token_id: int) -> None: ...


class Waits(TorchDispatchMode):
    """Counts what a host would wait for a device for: numbers it looks at, and shapes that data decides."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__"):
            patch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any) -> Any:
            self.count += 1
            return method(tensor, *args)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        unsized = func.overloadpacket is aten.repeat_interleave and kwargs.get("output_size") is None
        asks = func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
        self.count += by_mask or unsized or asks
        return func(*args, **kwargs)


def waits_of_a_step(make_row: MakeRow, batch: int) -> tuple[int, int]:
    """(waits before a transfer, transfers) of one step of rows that ask for everything there is."""
    rows = [make_row(seed=b, vocab=VOCAB, completion=(4, 9), **ASKS[b % len(ASKS)]) for b in range(batch)]
    rows[0].constraint = Bits()
    logits = torch.randn(batch, VOCAB, generator=torch.Generator().manual_seed(batch))
    if batch > 1:
        logits[1, 7] = torch.nan
    before: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        waits = Waits(patch)

        def counted(tensors: Sequence[Tensor]) -> list[Tensor]:
            before.append(waits.count)
            return download(tensors)

        patch.setattr(sampling, "download", counted)
        with waits:
            drawn = Sampler(compiled=False).sample(logits, rows)
    assert [isinstance(outcome, Sampled) for outcome in drawn] == [b != 1 for b in range(batch)]
    return before[0], len(before)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_step_is_one_transfer_and_no_wait_before_it(make_row: MakeRow) -> None:
    assert waits_of_a_step(make_row, 1) == waits_of_a_step(make_row, 32) == (0, 1)


def test_control_what_waits_is_counted() -> None:
    x = torch.arange(5.0)
    deeds: list[Callable[[], Any]] = [
        lambda: x.max().item(),
        lambda: x.tolist(),
        lambda: bool(x[0]),
        lambda: x[x > 2],
        lambda: x.nonzero(),
        lambda: x.repeat_interleave(torch.arange(5)),
        lambda: torch.equal(x, x),
    ]
    for deed in deeds:
        with pytest.MonkeyPatch.context() as patch:
            waits = Waits(patch)
            with waits:
                deed()
        assert waits.count >= 1


def test_control_the_ways_of_a_cpu_do_wait(make_row: MakeRow) -> None:
    """They are quicker there, and the same count sees them."""
    assert waits_of_a_step(make_row, 32)[0] > 0


types = st.sampled_from([torch.bool, torch.float32, torch.int64, torch.float64, torch.int32])


@given(st.lists(st.tuples(types, st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6))
def test_what_is_downloaded_together_is_what_it_was(made: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = [torch.randint(-9, 9, shape).to(dtype) for dtype, shape in made]
    there = download(tensors)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, there, strict=True))
