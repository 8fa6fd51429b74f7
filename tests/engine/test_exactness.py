"""The central promise: the same request gives the same bits, whatever else is running, cached, chunked or preempted.

Each proof stands beside a control: with exactness off the very same comparison must fail somewhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.scheduling.step_costs import StepCosts
from runs import Asked, Completion, collect, mixed_requests, run, thorough

MakeEngine = Callable[..., Engine]
MODELS = [
    ("llama", "float32"),
    ("llama", "bfloat16"),
    thorough("gpt2", "float32"),
    ("gemma3_text", "bfloat16"),
    thorough("gemma2", "bfloat16"),
    thorough("qwen3_moe", "float32"),
    ("qwen3_moe", "bfloat16"),
    thorough("mixtral", "float32"),
]
each_model = pytest.mark.parametrize(("arch", "dtype"), MODELS, ids=lambda value: str(value))


def everything(completion: Completion) -> list[tuple[object, ...]]:
    """Every number of every token, but the time at which it was made."""
    return [
        (t.token_id, t.logprob, t.sampling_logprob, t.top_logprobs, t.token_id_logprobs, t.kept)
        for t in completion.tokens
    ]


def alone(engine: Engine, asked: list[Asked]) -> list[list[tuple[object, ...]]]:
    return [everything(run(engine, [one])[0][0]) for one in asked]


def together(engine: Engine, asked: list[Asked]) -> list[list[tuple[object, ...]]]:
    return [everything(done[0]) for done in run(engine, asked)]


@each_model
def test_alone_is_in_a_batch_of_32(arch: str, dtype: str, make_engine: MakeEngine) -> None:
    engine = make_engine(arch, dtype=dtype, prefix_caching=False)
    asked = mixed_requests(32, max_tokens=12)
    assert together(engine, asked) == alone(engine, asked)


@each_model
def test_whole_is_chunked_at_ragged_sizes(arch: str, dtype: str, make_engine: MakeEngine) -> None:
    asked = mixed_requests(6, seed=1)
    whole = together(make_engine(arch, dtype=dtype, prefix_caching=False), asked)
    for tokens, chunk in [(23, 7), (65, 13)]:
        ragged = make_engine(
            arch,
            dtype=dtype,
            prefix_caching=False,
            max_num_seqs=8,
            max_num_batched_tokens=tokens,
            prefill_chunk=chunk,
        )
        assert together(ragged, asked) == whole


@each_model
def test_planned_by_a_clock_is_planned_by_any_other(
    arch: str, dtype: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many prompt tokens share a step follows from measured seconds, which no two runs have in common."""
    asked = mixed_requests(12, seed=4)
    usual = together(make_engine(arch, dtype=dtype, prefix_caching=False), asked)
    rng, parts = random.Random(5), list[int]()

    def tokens_in(costs: StepCosts, seconds: float, context: int, most: int) -> int:
        parts.append(rng.randint(0, most))
        return parts[-1]

    monkeypatch.setattr(StepCosts, "tokens_in", tokens_in)
    assert together(make_engine(arch, dtype=dtype, prefix_caching=False), asked) == usual
    assert len(parts) > len(asked), "the control: prompts were cut, or had to wait"


@each_model
def test_cold_is_from_the_prefix_cache(arch: str, dtype: str, make_engine: MakeEngine) -> None:
    engine = make_engine(arch, dtype=dtype)
    engine.scheduler.pool.forget_all()
    asked = [Asked(list(range(100, 180)), SamplingParams(max_tokens=12, seed=s, top_p=0.9)) for s in range(3)]
    cold = [run(engine, [one])[0][0] for one in asked[:1]]
    assert cold[0].metrics is not None and cold[0].metrics.cached_tokens == 0
    warm = [run(engine, [one])[0][0] for one in asked]
    assert all(c.metrics is not None and c.metrics.cached_tokens == 64 for c in warm)
    uncached = make_engine(arch, dtype=dtype, prefix_caching=False)
    assert [everything(c) for c in warm] == alone(uncached, asked)


@each_model
def test_never_is_often_preempted(arch: str, dtype: str, make_engine: MakeEngine) -> None:
    asked = mixed_requests(12, seed=2, max_tokens=60)
    calm = together(make_engine(arch, dtype=dtype, prefix_caching=False), asked)
    tight = make_engine(arch, dtype=dtype, num_blocks=6, max_num_seqs=8)
    assert together(tight, asked) == calm
    assert tight.scheduler.num_preemptions > 3, "the pool was not small enough to show anything"


@each_model
def test_one_is_the_first_of_sixteen(arch: str, dtype: str, make_engine: MakeEngine) -> None:
    engine = make_engine(arch, dtype=dtype)
    params = SamplingParams(max_tokens=10, seed=3, ignore_eos=True)
    prompt = list(range(40, 85))
    [sixteen] = run(engine, [Asked(prompt, params, n=16)])

    async def just(index: int) -> Completion:
        return (await collect(engine.submit(prompt, params, SubmitOptions(sample_index=index))))[0]

    for index in (0, 7, 15):
        assert everything(asyncio.run(just(index))) == everything(sixteen[index])


@each_model
def test_teacher_forcing_is_decoding(arch: str, dtype: str, make_engine: MakeEngine) -> None:
    engine = make_engine(arch, dtype=dtype)
    prompt = list(range(60, 93))
    params = SamplingParams(max_tokens=140, seed=8, ignore_eos=True, top_logprobs=3)
    drawn = run(engine, [Asked(prompt, params)])[0][0]
    scoring = SamplingParams(max_tokens=1, seed=8, prompt_logprobs=3)
    others = mixed_requests(4)  # the prompt is scored in chunks of other lengths, among rows that decode
    forced = run(
        engine, [Asked(prompt + drawn.ids, scoring), Asked((prompt + drawn.ids)[:90], scoring), *others]
    )
    for choice, count in ((forced[0][0], 140), (forced[1][0], 90 - len(prompt))):
        scores = next(d.prompt_logprobs for d in choice.deltas if d.prompt_logprobs is not None)
        assert [(s.token_id, s.logprob, s.top_logprobs) for s in scores[len(prompt) :]] == [
            (t.token_id, t.logprob, t.top_logprobs) for t in drawn.tokens[:count]
        ]


def test_before_is_after_a_restart(tiny_model: Callable[[str], Path], make_engine: MakeEngine) -> None:
    asked = mixed_requests(8, seed=4)
    before = together(make_engine("qwen3", dtype="bfloat16"), asked)
    again = Engine.from_pretrained(str(tiny_model("qwen3")), EngineConfig(num_blocks=128, dtype="bfloat16"))
    try:
        assert together(again, asked) == before
    finally:
        again.shutdown()


THREADS = (1, 2, 3, 5, 6, 8)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        thorough("llama", "float32"),
        thorough("odd_gemma3", "float32"),
        ("odd_gemma3", "bfloat16"),
        ("odd_starcoder2", "float32"),
    ],
    ids=str,
)
def test_any_number_of_threads_gives_the_same(arch: str, dtype: str, make_engine: MakeEngine) -> None:
    """Alone on one thread, together on all the others, in batches of an odd number of rows."""
    import torch

    asked = mixed_requests(7, seed=5)
    engine = make_engine(arch, dtype=dtype, prefix_caching=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = alone(engine, asked)
        for threads in THREADS:
            torch.set_num_threads(threads)
            engine.runner.recorded_steps.clear()  # a recording keeps the number of threads it was made with
            assert together(engine, asked) == expected, f"{threads} threads"
    finally:
        torch.set_num_threads(before)
        engine.runner.recorded_steps.clear()


def test_control_without_exactness_the_batch_shows(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", dtype="float32", prefix_caching=False, exact="off")
    asked = mixed_requests(32)
    assert together(engine, asked) != alone(engine, asked)


def test_control_the_comparison_sees_one_bit(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("llama", dtype="float32", prefix_caching=False)
    asked = mixed_requests(2)
    before = together(engine, asked)
    sample = engine.runner.sampler.sample

    def nudged(logits: Any, rows: Any, places: Any) -> Any:
        return sample(logits.float().nextafter(logits.float() + 1), rows, places)

    monkeypatch.setattr(engine.runner.sampler, "sample", nudged)
    assert together(engine, asked) != before
