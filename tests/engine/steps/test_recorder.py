"""A recorded step gives what the step itself gives, on whatever its inputs then hold."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.config import EngineConfig
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.runner.self_test import is_batch_invariant
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.scheduler import Batch, ScheduledTokens
from myserve.engine.steps.inputs import Shape
from myserve.engine.steps.launches import Launches, Operation
from myserve.engine.steps.recorder import NotRecordableError, Pool, Recording
from myserve.engine.steps.recordings import MOST_ROWS, shape_for
from myserve.engine.weights import loader


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
    assert names == ["sin.default", "exp.default", "add_.Tensor", "sum.default", "mul.Tensor"]
    x.copy_(torch.randn(5, 64))
    assert torch.equal(recording.replay().clone(), forward()) and counter == 3


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


def make_runner(folder: Path, dtype: str) -> ModelRunner:
    config = EngineConfig(dtype=dtype, num_blocks=64)
    return ModelRunner(loader.load(str(folder), config), config)


def step(runner: ModelRunner, counts: list[int], seed: int) -> Tensor:
    """The last so many tokens of each of some requests with random contexts in random pages; logits of the last."""
    rng = random.Random(seed)
    pages = rng.sample(range(64), 64)
    batch = Batch()
    for number, count in enumerate(counts):
        prompt = [rng.randrange(384) for _ in range(count + rng.randint(0, 89))]
        request = Request(id=str(number), prompt_token_ids=prompt, max_tokens=1)
        request.block_table = [pages.pop() for _ in range(0, len(prompt), runner.kv_cache.block_size)]
        batch.add(ScheduledTokens(request, len(prompt) - count, count))
    with torch.inference_mode():
        return runner.forward(batch, [end - 1 for end in accumulate(counts)]).clone()


def decode(runner: ModelRunner, requests: int, seed: int) -> Tensor:
    return step(runner, [1] * requests, seed)


def recorded_and_plain(folder: Path, dtype: str) -> tuple[ModelRunner, ModelRunner]:
    """The same model twice, with the same random keys and values; one records its steps."""
    recorded, plain = (make_runner(folder, dtype) for _ in range(2))
    plain.recorded_steps.usable = False
    for runner in (recorded, plain):
        generator = torch.Generator().manual_seed(0)
        for layer in runner.kv_cache.layers:
            for cache in layer:
                cache.copy_(torch.randn(cache.shape, generator=generator))
    return recorded, plain


KINDS = [("qwen3", "bfloat16"), ("gemma3_text", "float32"), ("gpt2", "float32")]


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
def test_replayed_decode_steps_have_the_bits_of_the_model(
    tiny_model: Callable[[str], Path], arch: str, dtype: str
) -> None:
    recorded, plain = recorded_and_plain(tiny_model(arch), dtype)
    for seed, count in enumerate([3, 3, 5, 3, 1, 5, 3, 20, 1, 20]):
        assert torch.equal(decode(recorded, count, seed), decode(plain, count, seed)), (seed, count)
    steps = recorded.recorded_steps
    assert steps.usable and sorted(shape.requests for shape in steps._steps) == [1, 3, 5, 20]
    assert any(isinstance(part, Launches) for part in steps._steps[Shape(3, 3, 3)][1]._parts)


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
def test_steps_with_prompts_share_a_recording_with_room_to_spare(
    tiny_model: Callable[[str], Path], arch: str, dtype: str
) -> None:
    """What an earlier, larger step left in the room is nobody's: it changes no bit and no page."""
    recorded, plain = recorded_and_plain(tiny_model(arch), dtype)
    ragged = [[90, 1, 20], [60, 50], [97], [1, 1, 1, 1, 99], [5, 3], [1, 11], [2], [300], [1, 280, 1]]
    for seed, counts in enumerate([*ragged, *reversed(ragged)]):
        assert torch.equal(step(recorded, counts, seed), step(plain, counts, seed)), counts
        for ours, theirs in zip(recorded.kv_cache.layers, plain.kv_cache.layers, strict=True):
            assert all(map(torch.equal, ours, theirs)), counts
    assert recorded.recorded_steps.usable and len(recorded.recorded_steps._steps) <= 6


def test_a_step_that_is_too_large_for_any_recording_runs_as_it_is(tiny_model: Callable[[str], Path]) -> None:
    recorded, plain = recorded_and_plain(tiny_model("llama"), "float32")
    counts = [MOST_ROWS // 2, MOST_ROWS // 2 + 1]
    assert torch.equal(step(recorded, counts, 0), step(plain, counts, 0))
    assert not recorded.recorded_steps._steps


def test_a_recording_has_room_for_its_step() -> None:
    request = Request(id="0", prompt_token_ids=[1] * 600, max_tokens=1)
    for requests in (1, 2, 17, 64):
        for rows in range(requests, MOST_ROWS + 1):
            scheduled = [
                ScheduledTokens(request, 0, rows - requests + 1),
                *[ScheduledTokens(request, 0, 1)] * (requests - 1),
            ]
            shape = shape_for(scheduled, requests)
            assert shape is not None and shape.rows >= rows and shape.requests >= requests <= shape.wanted
            assert (shape.rows == shape.requests) == (rows == requests), (
                "only decodes are known by their number"
            )


def test_control_a_model_that_reads_its_data_in_python_is_found_out(
    tiny_model: Callable[[str], Path],
) -> None:
    runner = make_runner(tiny_model("llama"), "float32")

    def shift(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + float(args[0].numpy().sum())  # NumPy tells no dispatch mode

    runner.model.model.layers[0].mlp.register_forward_hook(shift)
    first, second = decode(runner, 2, seed=1), decode(runner, 2, seed=2)
    assert not runner.recorded_steps.usable
    runner.recorded_steps.usable = False
    assert torch.equal(second, decode(runner, 2, seed=2)) and not torch.equal(first, second)


def test_both_kinds_of_recording_are_proved_before_anybody_asks(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof computes a step twice: not one of a user's."""
    runner = make_runner(tiny_model("qwen3"), "float32")
    assert is_batch_invariant(runner, 384)
    computed = []
    monkeypatch.setattr(runner.recorded_steps, "_forward", lambda inputs: computed.append(inputs))
    for counts in ([2, 1], [1]):  # shapes that the check has recorded
        step(runner, counts, seed=0)
    assert not computed and runner.recorded_steps.usable


def test_mixtures_of_experts_are_not_recorded(tiny_model: Callable[[str], Path]) -> None:
    assert not make_runner(tiny_model("qwen3_moe"), "float32").recorded_steps.usable
