"""Models with recurrent layers: a request's bits do not depend on what runs beside it, and its state is nobody else's.

That they are transformers' own numbers is in `test_model_zoo.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model
from drafters import Kind, run_drafting
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.scheduling.block_tables import BlockTables
from myserve.engine.scheduling.request import Request
from myserve.trainer.completion_logits import completion_logits
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs
from runs import Asked, Completion, collect, mixed_requests, run, thorough

MakeEngine = Callable[..., Engine]
MODELS = [
    ("qwen3_5_text", "float32"), ("granitemoehybrid-scan", "bfloat16"),
    ("jamba", "bfloat16"), thorough("zamba", "float32"), thorough("falcon_mamba", "bfloat16"),
    thorough("minimax", "float32"), thorough("minimax", "bfloat16"), thorough("bailing_hybrid", "bfloat16"),
]  # fmt: skip
each_model = pytest.mark.parametrize(("arch", "dtype"), MODELS, ids=str)
PROMPT = list(range(40, 85))


def numbers(engine: Engine, asked: list[Asked]) -> list[list[tuple[int, float, float]]]:
    done = [choices[0].numbers for choices in run(engine, asked)]
    engine.scheduler.check_integrity()
    return done


@each_model
def test_alone_together_chunked_preempted_and_after_a_restart_a_request_has_the_same_bits(
    arch: str, dtype: str, make_engine: MakeEngine
) -> None:
    engine, asked = make_engine(arch, dtype=dtype), mixed_requests(8, seed=2, max_tokens=24)
    assert engine.exactness["rows_are_independent"]
    together = numbers(engine, asked)
    assert [numbers(engine, [one])[0] for one in asked] == together
    ragged = make_engine(arch, dtype=dtype, max_num_seqs=8, max_num_batched_tokens=23, prefill_chunk=7)
    assert numbers(ragged, asked) == together
    tight = make_engine(arch, dtype=dtype, num_blocks=4, max_num_seqs=6)
    assert numbers(tight, asked) == together
    assert tight.scheduler.num_preemptions, "the pool was not small enough to show anything"
    states = engine.scheduler.block_tables.states
    assert states is not None and states.num_free == states.num_slots


def test_the_control_a_state_that_is_not_taken_on_gives_other_bits(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = (
        make_engine("qwen3_5_text", dtype="float32"),
        [Asked(PROMPT, SamplingParams(max_tokens=20, seed=1))],
    )
    usual = numbers(engine, asked)

    commit = BlockTables.commit

    def keeps_the_old_one(tables: BlockTables, request: Any) -> None:
        if request.state_slot < 0:
            commit(tables, request)
        else:
            tables._release(request.next_state_slot)
            request.next_state_slot = -1

    monkeypatch.setattr(BlockTables, "commit", keeps_the_old_one)
    assert [choices[0].numbers for choices in run(engine, asked)] != usual


@each_model
def test_one_choice_is_that_of_eight_though_they_share_the_prompts_state(
    arch: str, dtype: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(arch, dtype=dtype)
    params = SamplingParams(max_tokens=10, seed=3, ignore_eos=True)
    [eight] = run(engine, [Asked(PROMPT, params, n=8)])
    for index in (0, 5, 7):
        stream = lambda: engine.submit(PROMPT, params, SubmitOptions(sample_index=index))  # noqa: B023, E731

        async def just() -> list[tuple[int, float, float]]:
            return (await collect(stream()))[0].numbers  # noqa: B023

        assert asyncio.run(just()) == eight[index].numbers


def test_aborted_requests_leave_no_slot_behind(make_engine: MakeEngine) -> None:
    engine = make_engine("qwen3_5_text", dtype="float32")

    async def begin_and_leave() -> None:
        for _ in range(6):
            stream = engine.submit(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True), SubmitOptions(n=3))
            async for _ in stream:
                break
            stream.abort()
        await collect(engine.submit(PROMPT, SamplingParams(max_tokens=1), SubmitOptions()))

    asyncio.run(begin_and_leave())
    states = engine.scheduler.block_tables.states
    assert states is not None and states.num_free == states.num_slots


def test_new_weights_compute_from_the_next_request_on(tmp_path: Path) -> None:
    paths = [make_tiny_model("qwen3_5_text", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    asked = [Asked(PROMPT, SamplingParams(max_tokens=12, seed=1, ignore_eos=True))]
    engines = [Engine.from_pretrained(str(path), EngineConfig(num_blocks=32)) for path in paths]
    try:
        before, wanted = (numbers(engine, asked) for engine in engines)
        engines[0].update_weights(str(paths[1])).result()
        assert numbers(engines[0], asked) == wanted != before
    finally:
        for engine in engines:
            engine.shutdown()


@each_model
def test_a_second_turn_begins_from_the_state_of_the_first(
    arch: str, dtype: str, make_engine: MakeEngine
) -> None:
    engine, whole = make_engine(arch, dtype=dtype), make_engine(arch, dtype=dtype, prefix_caching=False)
    params = SamplingParams(max_tokens=40, seed=9, ignore_eos=True)
    prompt = [(3 + 7 * i) % 380 for i in range(150)]
    [[first]] = run(engine, [Asked(prompt, params)])
    again = [
        Asked(prompt, params),
        Asked([*prompt, *first.ids, 5, 6, 7], SamplingParams(max_tokens=8, seed=2)),
    ]
    for one, cached in zip(again, (128, 160), strict=True):  # the last border of the prompt; of its answer
        [[warm]] = run(engine, [one])
        assert warm.metrics is not None and warm.metrics.cached_tokens == cached
        assert [warm.numbers] == numbers(whole, [one])
    engine.scheduler.check_integrity()


@each_model
def test_the_third_prompt_behind_one_instruction_begins_from_its_state(
    arch: str, dtype: str, make_engine: MakeEngine
) -> None:
    engine, whole = make_engine(arch, dtype=dtype), make_engine(arch, dtype=dtype, prefix_caching=False)
    instruction = [(11 + 5 * i) % 380 for i in range(170)]
    params = SamplingParams(max_tokens=9, seed=4, ignore_eos=True)
    asked = [Asked([*instruction, *range(i, i + 40)], params) for i in (20, 70, 120)]
    found = [run(engine, [one])[0][0] for one in asked]
    assert [one.metrics and one.metrics.cached_tokens for one in found] == [0, 0, 160]
    assert [one.numbers for one in found] == numbers(whole, asked)


def test_one_request_at_a_time_leaves_states_to_the_next_ones(make_engine: MakeEngine) -> None:
    """Two slots are what it steps on: there are others for what it leaves."""
    engine = make_engine("qwen3_5_text", dtype="float32", max_num_seqs=1)
    params = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    prompts = [[(i * step) % 380 for i in range(150)] for step in (3, 7)]
    for cached in (0, 128):
        for prompt in prompts:
            [[found]] = run(engine, [Asked(prompt, params)])
            assert found.metrics is not None and found.metrics.cached_tokens == cached


@each_model
def test_a_trainer_has_the_servers_bits_padded_or_with_shared_prompts(
    arch: str, dtype: str, make_engine: MakeEngine, tiny_model: Callable[[str], Path]
) -> None:
    engine, params = make_engine(arch, dtype=dtype), SamplingParams(max_tokens=14, seed=5, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:9]]
    drawn = run(engine, [Asked(prompt, params, n=2) for prompt in prompts])
    samples = [(prompt, c) for prompt, choices in zip(prompts, drawn, strict=True) for c in choices]
    wanted = [t.logprob for _, c in samples for t in c.tokens]
    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=getattr(torch, dtype)).eval()
    exact_forward(model)
    ids, width = [c.ids for _, c in samples], max(len(p) + len(c.ids) for p, c in samples)
    with torch.no_grad():
        logits = completion_logits(model, [p for p, _ in samples], ids)
    assert exact_logprobs(logits, torch.tensor([i for row in ids for i in row])).tolist() == wanted
    padded = torch.zeros(len(samples), width, dtype=torch.int64)
    for row, (prompt, c) in enumerate(samples):  # on the left
        padded[row, width - len(prompt) - len(c.ids) :] = torch.tensor([*prompt, *c.ids])
    lengths = torch.tensor([len(p) + len(c.ids) for p, c in samples])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    with torch.no_grad():
        full = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    found = [
        exact_logprobs(full[row, -len(c.ids) - 1 : -1], torch.tensor(c.ids)).tolist()
        for row, (_, c) in enumerate(samples)
    ]
    assert [x for row in found for x in row] == wanted


def test_gradients_are_transformers_own(tiny_model: Callable[[str], Path]) -> None:
    found = []
    prompts, completions = [PROMPT[:20]] * 2 + [PROMPT[:5]], [[1, 2, 3], [4, 5], [6]]
    for way in ("ours", "theirs", "shared"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3_5_text")).eval()
        if way != "theirs":
            exact_forward(model)
        if way == "shared":
            logits = completion_logits(model, prompts, completions)
        else:
            rows = [
                model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1]
                for p, c in zip(prompts, completions, strict=True)
            ]
            logits = torch.cat(rows)
        targets = torch.tensor([i for row in completions for i in row])
        torch.nn.functional.cross_entropy(logits, targets).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    ours, theirs, shared = found
    for name, grad in theirs.items():
        assert grad is not None and ours[name] is not None and shared[name] is not None, name
        for other in (ours[name], shared[name]):
            assert torch.allclose(other, grad, atol=1e-4 * float(grad.abs().max()) + 1e-7, rtol=1e-2), name
    assert any("A_log" in name for name in theirs) and any("conv1d" in name for name in theirs)


def test_a_mixtures_experts_are_reported_and_do_not_depend_on_the_batch(make_engine: MakeEngine) -> None:
    engine = make_engine("granitemoehybrid-scan", dtype="bfloat16")
    params = SamplingParams(max_tokens=6, seed=2, ignore_eos=True, routed_experts=True, prompt_logprobs=0)
    asked = [Asked(PROMPT[:n], params) for n in (30, 7)]

    def routed(done: list[list[Completion]]) -> list[list[bytes | None]]:
        return [[t.routed_experts for t in choices[0].tokens] for choices in done]

    together = routed(run(engine, asked))
    assert all(experts for row in together for experts in row)
    assert [routed(run(engine, [one]))[0] for one in asked] == together


@each_model
def test_drafts_right_and_wrong_change_no_bit_and_states_are_rolled_back(
    arch: str, dtype: str, make_engine: MakeEngine
) -> None:
    off = make_engine(arch, dtype=dtype, prefix_caching=False, speculation="off")
    forced = make_engine(arch, dtype=dtype, speculation="5")
    asked = [*mixed_requests(8, seed=4, max_tokens=24), Asked(PROMPT, SamplingParams(max_tokens=40, seed=1))]
    plain = run(off, asked)
    kinds: tuple[Kind, ...] = ("right", "wrong", "mixed")
    for kind in kinds:
        drafted = run_drafting(forced, asked, kind, plain)
        assert [c[0].numbers for c in drafted] == [c[0].numbers for c in plain], kind
        forced.scheduler.check_integrity()
    assert forced.scheduler.speculation is not None
    counts = forced.scheduler.speculation.counts
    assert 0 < counts.accepted_tokens < counts.draft_tokens
    states = forced.scheduler.block_tables.states
    assert states is not None and states.num_free == states.num_slots


def test_the_control_a_state_that_a_wrong_draft_left_gives_other_bits(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("qwen3_5_text", dtype="float32", speculation="5")
    asked = [Asked(PROMPT, SamplingParams(max_tokens=20, seed=1, ignore_eos=True))]
    plain = run(engine, asked)

    def takes_it(tables: BlockTables, request: Request, draft: int, accepted: int) -> None:
        request.num_computed_tokens += 1 + accepted
        tables.commit(request)

    monkeypatch.setattr(BlockTables, "judge", takes_it)
    assert [c[0].numbers for c in run_drafting(engine, asked, "wrong", plain)] != [
        c[0].numbers for c in plain
    ]
