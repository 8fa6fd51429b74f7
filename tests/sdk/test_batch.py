"""Many prompts: as they finish or in order, each sample with a seed of its own."""

from __future__ import annotations

import asyncio

import pytest

from myserve.sdk import FixedConcurrencyController, SamplingDeadlineError, SamplingError
from myserve.sdk.testing import scripted

pytestmark = pytest.mark.asyncio
PROMPTS = [[1, 2, number] for number in range(12)]


def texts(groups) -> list[list[str]]:
    return [[c.text for c in group] for group in groups]


async def test_awaited_it_is_in_the_order_of_the_prompts(make_sampler, stub):
    stub.next_token = scripted(lambda prompt, index: f"{prompt[2]}.{index}")
    assert texts(await make_sampler().sample_batch(PROMPTS, n=2)) == [[f"{i}.0", f"{i}.1"] for i in range(12)]


async def test_iterated_it_gives_groups_as_they_finish(make_sampler, stub):
    stub.next_token = scripted(lambda prompt, index: "long " * 50 if prompt[2] == 0 else "4")
    stub.pause = 0.001
    order = [group.prompt_index async for group in make_sampler().sample_batch(PROMPTS)]
    assert sorted(order) == list(range(12)) and order[-1] == 0


async def test_leaving_early_aborts_the_rest(make_sampler, stub):
    stub.next_token = scripted(lambda prompt, index: "long " * 50 if prompt[2] else "4")
    stub.pause = 0.001
    controller = FixedConcurrencyController(8)
    groups = aiter(make_sampler(concurrency_controller=controller).sample_batch(PROMPTS))
    assert (await anext(groups)).prompt_index == 0
    await groups.aclose()
    await asyncio.sleep(0.05)
    assert (controller.in_flight, stub.in_flight) == (0, 0)


async def test_every_prompt_and_every_copy_of_it_has_samples_of_its_own(make_sampler):
    groups = await make_sampler(run_seed=7).sample_batch([[1, 2, 3], [1, 2, 3], [1, 2, 4]], n=3)
    assert len({text for group in texts(groups) for text in group}) == 9


async def test_a_run_seed_decides_every_sample_whatever_the_order_and_the_window(make_sampler):
    groups = await make_sampler(run_seed=7).sample_batch(PROMPTS, n=3)
    narrow = make_sampler(run_seed=7, concurrency_controller=FixedConcurrencyController(2))
    backwards = await narrow.sample_batch(PROMPTS[::-1], n=3)
    assert texts(groups) == texts(backwards[::-1])
    assert texts(groups) == texts(await make_sampler().sample_batch(PROMPTS, n=3, seed=7))
    assert texts(groups) != texts(await make_sampler(run_seed=8).sample_batch(PROMPTS, n=3))


async def test_a_sampler_with_a_run_seed_repeats_its_calls_in_another_process(make_sampler):
    first, second = make_sampler(run_seed=7), make_sampler(run_seed=7)
    runs = [[await s.sample_with_prompt_tokens([1, 2], n=2) for _ in range(2)] for s in (first, second)]
    assert texts(runs[0]) == texts(runs[1])
    assert texts(runs[0])[0] != texts(runs[0])[1]  # asked again, a prompt gets new samples


async def test_the_deadline_is_for_the_whole_batch(make_sampler, stub):
    stub.next_token = scripted(lambda prompt, index: "long " * 200 if prompt[2] % 2 else "4")
    stub.pause = 0.005
    groups = await make_sampler().sample_batch(PROMPTS, deadline=0.4, on_error="keep")
    assert texts(groups) == [[] if i % 2 else ["4"] for i in range(12)]
    assert all(isinstance(e, SamplingDeadlineError) for group in groups for e in group.failures)


async def test_a_failure_raises_or_is_kept(make_sampler, stub, fault):
    stub.faults = [fault(status=400, message="no")]
    with pytest.raises(SamplingError, match="no"):
        await make_sampler().sample_batch(PROMPTS)
    stub.faults = [fault(status=400, message="no")]
    groups = await make_sampler().sample_batch(PROMPTS, on_error="keep")
    assert sum(len(group) for group in groups) == 11
    assert sum(len(group.failures) for group in groups) == 1


async def test_the_bar_counts_every_sample_once_and_leaves_stdout_alone(make_sampler, stub, fault, capsys):
    stub.faults = [fault(status=400)]
    await make_sampler().sample_batch(PROMPTS, n=2, progress=True, on_error="keep", max_seq_len=50)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "24/24" in captured.err and "2 failed" in captured.err


async def test_a_notebook_without_widgets_gets_the_bar_too(make_sampler, monkeypatch, capsys):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    await make_sampler().sample_batch(PROMPTS, n=2, progress=True)  # rich's warning would be an error here
    assert "24/24" in capsys.readouterr().err
