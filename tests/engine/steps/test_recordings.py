"""Recorded steps have the bits of the model's own; they are made while idle, and seldom while requests run."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from myserve.engine.config import EngineConfig
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.runner.self_test import is_batch_invariant
from myserve.engine.scheduling.batch import Batch, ScheduledTokens
from myserve.engine.scheduling.request import Request
from myserve.engine.steps import recordings
from myserve.engine.steps.inputs import Shape
from myserve.engine.steps.launches import Launches
from myserve.engine.steps.recordings import MOST_ROWS, likely_shapes, shape_for
from myserve.engine.weights import loader


@pytest.fixture(autouse=True)
def _all_shapes_are_recorded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here as on a server; tests/conftest.py keeps all other engines of tests to a few."""
    monkeypatch.setattr(recordings, "likely_shapes", likely_shapes)


@pytest.fixture
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape is recorded when it runs first, as on a server that has been idle."""
    monkeypatch.setattr(recordings, "STEPS_BETWEEN_RECORDINGS", 0)


def make_runner(folder: Path, dtype: str) -> ModelRunner:
    config = EngineConfig(dtype=dtype, num_blocks=64)
    return ModelRunner(loader.load(str(folder), config), config)


def step(
    runner: ModelRunner, counts: list[int], seed: int, num_pages: int = 64, *, are_read: bool = True
) -> Tensor:
    """The last so many tokens of each of some requests with random contexts in random pages; logits of the last."""
    rng = random.Random(seed)
    pages = rng.sample(range(num_pages), num_pages)
    longest = 89 if num_pages == 64 else 20
    batch = Batch()
    for number, count in enumerate(counts):
        prompt = [rng.randrange(384) for _ in range(count + rng.randint(0, longest))]
        request = Request(id=str(number), prompt_token_ids=prompt, max_tokens=1)
        request.block_table = [pages.pop() for _ in range(0, len(prompt), runner.kv_cache.block_size)]
        batch.add(ScheduledTokens(request, len(prompt) - count, count))
    with torch.inference_mode():
        wanted = [end - 1 for end in accumulate(counts)]
        return runner.forward(batch, wanted, are_read=are_read).clone()


def decode(runner: ModelRunner, requests: int, seed: int, num_pages: int = 64) -> Tensor:
    return step(runner, [1] * requests, seed, num_pages)


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


@pytest.mark.usefixtures("recorded_at_once")
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


@pytest.mark.usefixtures("recorded_at_once")
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


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
def test_shapes_recorded_while_idle_have_the_bits_of_the_model_and_touch_no_page(
    tiny_model: Callable[[str], Path], arch: str, dtype: str
) -> None:
    recorded, plain = recorded_and_plain(tiny_model(arch), dtype)
    steps = recorded.recorded_steps
    while len(steps._steps) < 40:
        assert recorded.prepare_while_idle(0)
    for ours, theirs in zip(recorded.kv_cache.layers, plain.kv_cache.layers, strict=True):
        assert all(map(torch.equal, ours, theirs)), "a recording computed something"
    known = dict(steps._steps)
    for seed, counts in enumerate([[1], [1, 1], [40], [9], [100], [250], [1, 1, 1], [300]]):
        assert torch.equal(step(recorded, counts, seed), step(plain, counts, seed)), counts
        for ours, theirs in zip(recorded.kv_cache.layers, plain.kv_cache.layers, strict=True):
            assert all(map(torch.equal, ours, theirs)), counts
    assert steps._steps == known, "each of them was recorded ahead"


def test_recording_ahead_is_dropped_when_a_request_comes_in_and_taken_up_again(
    tiny_model: Callable[[str], Path],
) -> None:
    """At whatever operation that is: nothing of it is kept, and the next one has the bits of the model."""
    recorded, plain = recorded_and_plain(tiny_model("qwen3"), "float32")
    steps = recorded.recorded_steps
    for calls in (0, 1, 7, 50):
        left = iter([False] * calls)
        assert steps.prepare(lambda left=left: next(left, True))  # type: ignore[misc]
        assert not steps._steps
    while Shape(16, 257, 1) not in steps._steps:
        assert recorded.prepare_while_idle(0)
    known = dict(steps._steps)
    for seed, counts in enumerate([[1], [1, 1], [9]]):
        assert torch.equal(step(recorded, counts, seed), step(plain, counts, seed)), counts
    assert steps._steps == known


def test_many_requests_decode_in_a_recording_with_room_for_sixteen_more(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "STEPS_BETWEEN_RECORDINGS", 0)
    config = EngineConfig(dtype="float32", num_blocks=400)
    recorded, plain = (ModelRunner(loader.load(str(tiny_model("qwen3")), config), config) for _ in range(2))
    plain.recorded_steps.usable = False
    for seed, count in enumerate([65, 80, 70, 128, 121, 256]):
        assert torch.equal(decode(recorded, count, seed, 400), decode(plain, count, seed, 400)), count
    assert sorted(shape.rows for shape in recorded.recorded_steps._steps) == [80, 128, 256]


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
def test_a_step_that_draws_nothing_runs_without_the_head_and_stores_the_same_keys_and_values(
    tiny_model: Callable[[str], Path], arch: str, dtype: str
) -> None:
    recorded, plain = recorded_and_plain(tiny_model(arch), dtype)
    headless = Shape(48, 257, 0)
    while headless not in recorded.recorded_steps._steps:
        assert recorded.prepare_while_idle(0)
    for seed, counts in enumerate([[40], [1, 40], [40], [1, 40]]):
        logits = step(recorded, counts, seed, are_read=seed < 2)
        assert logits.shape[0] == (len(counts) if seed < 2 else 0), "control: what is read is computed"
        step(plain, counts, seed)
        for ours, theirs in zip(recorded.kv_cache.layers, plain.kv_cache.layers, strict=True):
            assert all(map(torch.equal, ours, theirs)), counts


def test_a_head_that_does_not_run_on_nothing_runs_on_a_row(tiny_model: Callable[[str], Path]) -> None:
    runner = make_runner(tiny_model("llama"), "float32")
    steps = runner.recorded_steps
    runner.model.lm_head.register_forward_pre_hook(needs_a_row)
    runner.kv_cache.make_ready = lambda *_: False  # type: ignore[method-assign]
    while runner.prepare_while_idle(0):
        pass
    assert steps.usable and steps._steps and all(shape.wanted for shape in steps._steps)
    assert len(step(runner, [40], 0, are_read=False)) == 1


def needs_a_row(module: Any, args: Any) -> None:
    if not args[0].shape[1]:
        raise IndexError("no row")


def test_every_shape_is_recorded_while_idle_and_no_more(tiny_model: Callable[[str], Path]) -> None:
    config = EngineConfig(dtype="float32", num_blocks=70)
    runner = ModelRunner(loader.load(str(tiny_model("llama")), config), config)
    runner.kv_cache.make_ready = lambda *_: False  # type: ignore[method-assign]
    while runner.prepare_while_idle(0):
        pass
    few = {shape for shape in likely_shapes() if shape.wanted <= 64}
    assert set(runner.recorded_steps._steps) == few, "shapes of many requests wait until so many run"
    step(runner, [1] * 65, seed=0, num_pages=70)
    while runner.prepare_while_idle(0):
        pass
    assert set(runner.recorded_steps._steps) == set(likely_shapes())
    request = Request(id="0", prompt_token_ids=[1] * 600, max_tokens=1)
    for counts in ([1] * 7, [1] * 64, [1] * 65, [1] * 256, [3], [576], [1] * 63 + [100], [1] * 20 + [200]):
        shape = shape_for([ScheduledTokens(request, 0, count) for count in counts], len(counts))
        assert shape in runner.recorded_steps._steps


def test_a_busy_model_records_one_shape_in_fifty_steps(tiny_model: Callable[[str], Path]) -> None:
    """The others run in a recording with room for them, or unrecorded: their bits are the same."""
    recorded, plain = recorded_and_plain(tiny_model("llama"), "float32")
    steps = recorded.recorded_steps
    steps._allowed = 0
    known, made_at, typical = set(steps._steps), [], 0
    for number in range(160):
        counts = [1] * (1 + number % 9) if number % 3 else [10 + 7 * (number % 40)]
        assert torch.equal(step(recorded, counts, number), step(plain, counts, number)), counts
        assert not (steps.was_typical and len(steps._steps) > len(known)), (
            "what recording takes is not typical"
        )
        typical += steps.was_typical
        made_at += [number] * len(set(steps._steps) - known)
        known = set(steps._steps)
    assert len(made_at) >= 3, "the control: it does record"
    assert 0 < typical < 160 - len(made_at), "some steps were replayed, and some ran unrecorded"
    assert all(later - earlier >= 50 for earlier, later in pairwise(made_at))


def test_an_error_while_recording_ahead_is_nobodys_request(
    tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    runner = make_runner(tiny_model("llama"), "float32")
    fails = runner.model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    runner.kv_cache.make_ready = lambda *_: False  # type: ignore[method-assign]
    while runner.prepare_while_idle(0):
        pass
    assert "ZeroDivisionError" in caplog.text and not runner.recorded_steps._steps
    fails.remove()
    decode(runner, 2, seed=1)
    assert runner.recorded_steps._steps, "a step that runs is still recorded"
