"""A recorded step gives what the step itself gives, on whatever its inputs then hold."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.steps.launches import Launches, Operation, TensorPlace, storage
from myserve.engine.steps.recorder import (
    TOUCHED_AT_ONCE,
    InterruptedRecordingError,
    NotRecordableError,
    Pool,
    Recording,
)


@torch.inference_mode()
def test_kernels_and_tensor_operations_are_made_again_in_their_order() -> None:
    weight = PackedWeight(torch.randn(96, 64).bfloat16())
    x = torch.randn(5, 64).bfloat16()
    state = torch.zeros(5, 64).bfloat16()

    def forward() -> Tensor:
        state.add_(x)  # in place
        hidden = (x + state)[:, :64].reshape(1, 5, 64)
        return weight(hidden).cumsum(-1)[0, 1:]

    recording = Recording(forward, Pool())
    assert any(isinstance(part, Launches) for part in recording._parts)
    for _ in range(3):
        x.copy_(torch.randn(5, 64))
        before = state.clone()
        replayed = recording.replay().clone()
        state.copy_(before)
        assert torch.equal(replayed, forward())


@torch.inference_mode()
def test_memory_is_shared_within_a_recording_and_between_recordings() -> None:
    pool, a, b = Pool(), torch.randn(40, 64), torch.randn(3, 64)

    def chain(x: Tensor) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            for _ in range(20):
                x_ = x + x
                x_ = x_ + x
            return x_ + x

        return forward

    first, second = Recording(chain(a), pool), Recording(chain(b), pool)
    assert len(pool._blocks) <= 6, "two sizes, a few at a time"
    for _ in range(2):
        assert torch.equal(first.replay(), 4 * a)
        assert torch.equal(second.replay(), 4 * b)


@torch.inference_mode()
def test_what_torchs_operations_leave_is_shared_too() -> None:
    """A hundred recordings of operations that no kernel of ours makes take what one takes, and replay right."""
    pool, inputs = Pool(), [torch.randn(rows, 64) for rows in range(64, 164)]

    def chain(x: Tensor) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            halves = x.mT.mul(2).chunk(2)  # strides that are not contiguous; views of a fresh result
            for _ in range(20):
                halves = torch.cat([halves[1].sigmoid(), halves[0].tanh()]).chunk(2)
            return halves[0].sum(0)

        return forward

    recordings = [Recording(chain(x), pool) for x in inputs]
    assert sum(block.numel() for block in pool._blocks) < 8 * inputs[-1].nbytes
    held = [
        x
        for recording in recordings
        for part in recording._parts
        if isinstance(part, Operation)
        for x in tree_leaves((part.args, part.kwargs, part.results))
        if isinstance(x, Tensor) and not any(storage(x) == storage(given) for given in inputs)
    ]
    assert held and all(pool.has(storage(x)) for x in held), "nothing is kept that others could use"
    for x, recording in zip(inputs, recordings, strict=True):
        x.copy_(torch.randn(x.shape))
        assert torch.equal(recording.replay(), chain(x)())


@torch.inference_mode()
def test_what_a_module_keeps_of_a_recording_stays_as_it_is() -> None:
    """The control: what it does not keep is written over by the next recording."""
    pool, x, kept = Pool(), torch.randn(40, 64), list[Tensor]()

    def forward() -> Tensor:
        if not kept:
            kept.append(x.exp())
        return kept[0].sin().cos()

    Recording(forward, pool)
    was = kept[0].clone()
    let_go = TensorPlace(kept[0])
    Recording(lambda: x.tanh().sinh(), pool)
    assert torch.equal(kept[0], was)
    kept.clear()
    Recording(lambda: x.tanh().sinh(), pool)
    assert not torch.equal(let_go.tensor(), was)


@torch.inference_mode()
def test_memory_is_touched_a_little_at_a_time_and_no_more_than_a_tensor_has() -> None:
    """A tensor of 9 MiB lies in 16: the other seven are never handed out."""
    pool = Pool()
    large, small = pool.empty((9, 1 << 20), torch.uint8), pool.empty((100,), torch.float32)
    touched = []
    while pool.prefault():
        touched.append(sum(pool._touched.values()))
    amounts = [after - before for before, after in pairwise([0, *touched])]
    assert max(amounts) <= TOUCHED_AT_ONCE
    assert touched[-1] == large.nbytes + small.nbytes


def test_a_recording_that_is_over_ends_at_its_next_operation() -> None:
    ran = []

    def forward() -> Tensor:
        x = torch.ones(3)
        for number in range(10):
            ran.append(number)
            x = x.cumsum(0)
        return x

    with pytest.raises(InterruptedRecordingError):
        Recording(forward, Pool(), runs=False, is_over=lambda: len(ran) == 4)
    assert len(ran) == 4


@torch.inference_mode()
def test_what_nobody_reads_is_not_made_again() -> None:
    weight, x = PackedWeight(torch.randn(96, 64)), torch.randn(5, 64)
    counter = torch.zeros(1)

    def forward() -> Tensor:
        x.cos().sum()  # nobody reads it
        read_by_a_kernel, read_by_an_operation = x.sin(), x.exp()
        counter.add_(1)  # an effect
        return weight(read_by_a_kernel) * read_by_an_operation.sum()

    recording = Recording(forward, Pool())
    names = [part.func.__name__ for part in recording._parts if isinstance(part, Operation)]
    assert names == ["sin.default", "exp.default", "add_.Tensor", "sum.default"]
    x.copy_(torch.randn(5, 64))
    assert torch.equal(recording.replay().clone(), forward()) and counter == 3


@torch.inference_mode()
def test_what_follows_from_weights_alone_is_computed_once_and_anew_in_a_new_recording() -> None:
    rate, x = torch.randn(6), torch.randn(4, 6)

    def forward() -> Tensor:
        return x * -rate.double().exp().float()

    recording = Recording(forward, Pool(), weights=[rate])
    assert all(isinstance(part, Launches) for part in recording._parts)
    x.copy_(torch.randn(4, 6))
    before = forward()
    assert torch.equal(recording.replay(), before)
    rate.copy_(torch.randn(6))
    assert torch.equal(recording.replay(), before), "a recording holds what the weights were"
    assert torch.equal(Recording(forward, Pool(), weights=[rate]).replay(), forward())

    control = Recording(forward, Pool())  # of tensors that may change
    assert any(isinstance(part, Operation) for part in control._parts)
    rate.copy_(torch.randn(6))
    assert torch.equal(control.replay(), forward())


@torch.inference_mode()
def test_what_changes_a_weights_result_in_place_cannot_be_recorded() -> None:
    rate = torch.randn(6)
    with pytest.raises(NotRecordableError, match="changes what the weights give"):
        Recording(lambda: rate.exp().mul_(2), Pool(), weights=[rate])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_rows_by_index_are_a_kernels(dtype: torch.dtype) -> None:
    table = torch.randn(50, 24).to(dtype)
    ids = torch.randint(50, (1, 40))
    picked = torch.randint(40, (7,))

    def forward() -> Tensor:
        return nn.functional.embedding(ids, table)[:, picked]

    recording = Recording(forward, Pool())
    assert [len(part._table) for part in recording._parts if isinstance(part, Launches)] == [2]
    assert len(recording._parts) == 1
    ids.copy_(torch.randint(50, (1, 40)))
    assert torch.equal(recording.replay(), table[ids][:, picked])
    ids[0, picked[3]] = 50
    assert recording.replay()[0, 3].isnan().all(), "found by who draws from it, as a broken row is"


def test_a_recording_is_replayed_by_any_thread_while_its_own_computes_or_is_gone() -> None:
    """The thread that recorded has its scratch for itself: kernels of both run at once and neither sees the other."""
    weight = PackedWeight(torch.randn(640, 512))  # float32: rows are widened in scratch
    x, other = torch.randn(64, 512), torch.randn(64, 512)
    stop = threading.Event()

    def product() -> Tensor:
        return weight(x)

    def record_and_go_on() -> None:
        with torch.inference_mode():
            made.append(Recording(product, Pool()))
            recorded.set()
            while not stop.is_set():
                again.append(weight(other))
                del again[:-1]

    made: list[Recording] = []
    again: list[Tensor] = []
    recorded = threading.Event()
    thread = threading.Thread(target=record_and_go_on)
    thread.start()
    recorded.wait()
    wanted, wanted_there = weight(x), weight(other)
    with torch.inference_mode():
        try:
            for _ in range(200):
                assert torch.equal(made[0].replay(), wanted)
        finally:
            stop.set()
            thread.join()
        assert torch.equal(again[-1], wanted_there)
        assert torch.equal(made[0].replay(), wanted), "its thread is gone"


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), lambda x: x.nonzero()], ids=["item", "nonzero"])
def test_who_looks_at_data_cannot_be_recorded(look: Callable[[Tensor], object]) -> None:
    def forward() -> Tensor:
        x = torch.ones(3)
        look(x)
        return x

    with pytest.raises(NotRecordableError):
        Recording(forward, Pool())
