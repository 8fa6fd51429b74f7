"""Drafts never change a token: every number of every completion is what it is without them, right drafts or wrong."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from drafters import Kind, drafting, run_drafting
from myserve.core.grammar import Grammar
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.runner import drawing
from myserve.engine.scheduling.request import Request
from myserve.errors import RequestError
from runs import Asked, Completion, collect, mixed_requests, run, thorough

MakeEngine = Callable[..., Engine]
KINDS: tuple[Kind, ...] = ("right", "wrong", "mixed")
PROMPT = list(range(40, 85))
MODELS = [
    thorough("llama", "float32"),
    ("llama", "bfloat16"),
    thorough("gpt2", "float32"),
    thorough("gemma3_text", "bfloat16"),
    ("qwen3_moe", "bfloat16"),
    thorough("mixtral", "float32"),
]
each_model = pytest.mark.parametrize(("arch", "dtype"), MODELS, ids=lambda value: str(value))


def everything(done: list[list[Completion]]) -> list[list[tuple[object, ...]]]:
    """All that a caller is told, but times, metrics, and which tokens were drafted."""
    return [
        [
            (c.text, c.finish_reason, c.stop_reason, len(c.shown), *(_numbers(t) for t in c.tokens))
            for c in choices
        ]
        for choices in done
    ]


def _numbers(t: Any) -> tuple[object, ...]:
    return (
        t.token_id, t.logprob, t.sampling_logprob, t.top_logprobs, t.token_id_logprobs, t.kept, t.routed_experts,
        t.weight_version,
    )  # fmt: skip


def counts(engine: Engine) -> tuple[int, int]:
    speculation = engine.scheduler.speculation
    assert speculation is not None
    return speculation.counts.draft_tokens, speculation.counts.accepted_tokens


def all_kinds(off: Engine, forced: Engine, asked: list[Asked]) -> list[list[Completion]]:
    """Run requests without drafts and with each kind, and compare; return the plain ones."""
    plain = run(off, asked)
    for kind in KINDS:
        before = counts(forced)
        drafted = run_drafting(forced, asked, kind, plain)
        verified, accepted = (now - then for now, then in zip(counts(forced), before, strict=True))
        assert verified, "nothing was drafted"
        assert (accepted > 0) == (kind != "wrong"), kind
        assert everything(drafted) == everything(plain), kind
        forced.scheduler.check_integrity()
    return plain


@each_model
def test_mixed_requests_are_what_they_are_without_drafts(
    arch: str, dtype: str, make_engine: MakeEngine
) -> None:
    off = make_engine(arch, dtype=dtype, prefix_caching=False, speculation="off")
    asked = mixed_requests(24)
    plain = all_kinds(off, make_engine(arch, dtype=dtype, prefix_caching=False, speculation="4"), asked)
    alone = [
        run(make_engine(arch, dtype=dtype, prefix_caching=False, speculation="auto"), [one])[0]
        for one in asked
    ]
    assert everything(alone) == everything(plain)


def test_control_a_draft_that_is_believed_shows(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = mixed_requests(6)
    plain = run(make_engine("llama", speculation="off"), asked)
    forced = make_engine("llama", speculation="4")

    def believe(batch: Any, draw: int, depth: int, token_id: int) -> bool:
        return depth < len(batch.scheduled[batch.draws[draw][1]].draft)

    monkeypatch.setattr(drawing, "_is_right", believe)
    # the scheduler takes what was drawn for a draft's end, and ends no completion early
    assert everything(run_drafting(forced, asked, "mixed", plain)) != everything(plain)


def test_preempted_requests_are_what_they_are_without_drafts(make_engine: MakeEngine) -> None:
    asked = mixed_requests(12, seed=2, max_tokens=60)
    off = make_engine("llama", dtype="bfloat16", prefix_caching=False, speculation="off")
    tight = make_engine("llama", dtype="bfloat16", num_blocks=6, max_num_seqs=8, speculation="6")
    before = tight.scheduler.num_preemptions
    all_kinds(off, tight, asked)
    assert tight.scheduler.num_preemptions > before + 3


def test_the_ends_of_completions_lie_inside_drafts(make_engine: MakeEngine) -> None:
    """EOS, stop ids, stop strings, max_tokens and the context's end: everything behind them is dropped."""
    off = make_engine("llama", speculation="off")
    [[free]] = run(
        off, [Asked(PROMPT, SamplingParams(seed=5, max_tokens=40, ignore_eos=True, temperature=1.5))]
    )
    ends = [
        {"stop_token_ids": (free.ids[9],)},
        {"stop_token_ids": (free.ids[9],), "include_stop_str_in_output": True},
        {"stop_token_ids": (free.ids[3],), "min_tokens": 12},
        {"stop": (free.text[11:14],)},
        {"stop": (free.text[20:22],), "include_stop_str_in_output": True},
        {"max_tokens": 2},
        {"max_tokens": 7},
        {"logit_bias": {2: 6.0}, "ignore_eos": False},
    ]
    common = {"seed": 5, "max_tokens": 40, "ignore_eos": True, "temperature": 1.5}
    asked = [Asked(PROMPT, SamplingParams(**(common | end))) for end in ends]
    asked.append(Asked([i % 384 for i in range(503)], SamplingParams(seed=1, ignore_eos=True)))
    plain = all_kinds(off, make_engine("llama", speculation="7"), asked)
    assert {c.finish_reason for [c] in plain} == {"stop", "length"}
    assert len(plain[-1][0].ids) == 512 - 503


def test_what_wrong_drafts_wrote_is_never_found_in_the_prefix_cache(make_engine: MakeEngine) -> None:
    params = SamplingParams(seed=9, max_tokens=70, ignore_eos=True)
    asked = [Asked(PROMPT, params)]
    off = make_engine("llama", speculation="off", prefix_caching=False)
    plain = run(off, asked)
    again = [Asked(PROMPT + plain[0][0].ids, SamplingParams(seed=4, max_tokens=8, ignore_eos=True))]
    expected = everything(run(off, again))
    for kind in KINDS:
        forced = make_engine("llama", speculation="6")
        forced.scheduler.pool.forget_all()
        run_drafting(forced, asked, kind, plain)
        [[found]] = run(forced, again)
        assert found.metrics is not None and found.metrics.cached_tokens >= 96
        assert everything([[found]]) == expected


def test_control_a_block_published_before_its_last_token_is_verified_shows(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same comparison fails where a block counts as computed before its last token is run."""
    params = SamplingParams(seed=9, max_tokens=96 - len(PROMPT), ignore_eos=True)
    asked = [Asked(PROMPT, params)]
    off = make_engine("llama", speculation="off", prefix_caching=False)
    plain = run(off, asked)
    again = [Asked(PROMPT + plain[0][0].ids + [5], SamplingParams(seed=4, max_tokens=8, ignore_eos=True))]
    forced = make_engine("llama", speculation="6", num_blocks=127)
    scheduler = forced.scheduler
    append = scheduler._append

    def early(request: Request, token_ids: Any, draft: int, now: float) -> str | None:
        reason = append(request, token_ids, draft, now)
        computed, request.num_computed_tokens = request.num_computed_tokens, request.num_tokens
        scheduler.block_tables.publish_full(request)
        request.num_computed_tokens = computed
        return reason

    monkeypatch.setattr(scheduler, "_append", early)
    run_drafting(forced, asked, "wrong", plain)
    [[found]] = run(forced, again)
    assert found.metrics is not None and found.metrics.cached_tokens == 96
    assert everything([[found]]) != everything(run(off, again))


def test_siblings_priorities_and_prompt_logprobs(make_engine: MakeEngine) -> None:
    def asked() -> list[Asked]:
        return [
            Asked(PROMPT, SamplingParams(seed=1, max_tokens=20, temperature=0.8, ignore_eos=True), n=6),
            Asked(PROMPT[:9], SamplingParams(seed=2, max_tokens=20, prompt_logprobs=2, ignore_eos=True), n=2),
            Asked(
                PROMPT[:30],
                SamplingParams(seed=3, max_tokens=20, frequency_penalty=1.0, ignore_eos=True),
                n=3,
            ),
        ]

    off = make_engine("gemma2", dtype="bfloat16", speculation="off")
    forced = make_engine("gemma2", dtype="bfloat16", speculation="5")
    plain = all_kinds(off, forced, asked())
    scores = [d.prompt_logprobs for d in plain[1][0].deltas if d.prompt_logprobs]
    drafted = run_drafting(forced, asked(), "right", plain)
    assert [d.prompt_logprobs for d in drafted[1][0].deltas if d.prompt_logprobs] == scores

    async def by_priority() -> list[list[Completion]]:
        options = [SubmitOptions(n=a.n, priority=-i) for i, a in enumerate(asked())]
        streams = [forced.submit(a.prompt, a.params, o) for a, o in zip(asked(), options, strict=True)]
        return list(await asyncio.gather(*map(collect, streams)))

    with drafting(forced, "mixed", [[c.ids for c in choices] for choices in plain]):
        assert everything(asyncio.run(by_priority())) == everything(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routing_is_captured_at_every_verified_row(dtype: str, make_engine: MakeEngine) -> None:
    asked = [
        Asked(PROMPT[: 5 + i], SamplingParams(seed=i, max_tokens=20, routed_experts=i != 1, ignore_eos=True))
        for i in range(3)
    ]
    off = make_engine("qwen3_moe", dtype=dtype, speculation="off")
    plain = all_kinds(off, make_engine("qwen3_moe", dtype=dtype, speculation="4"), asked)
    assert all((t.routed_experts is None) == (i == 1) for i, [c] in enumerate(plain) for t in c.tokens)


def test_grammars_advance_along_drafts(make_engine: MakeEngine) -> None:
    grammars = [
        Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
        Grammar("regex", r"(yes|no|maybe)( (yes|no|maybe)){3,9}"),
        Grammar.choice(["red", "green", "blue"]),
        None,
    ]
    asked = [Asked(PROMPT, SamplingParams(seed=i, max_tokens=40, grammar=grammars[i % 4])) for i in range(8)]

    async def prepare(engine: Engine) -> None:
        for one in asked:
            await engine.prepare(one.params)

    off, forced = make_engine("llama", speculation="off"), make_engine("llama", speculation="4")
    asyncio.run(prepare(off))
    asyncio.run(prepare(forced))
    all_kinds(off, forced, asked)


def test_what_a_grammar_forces_is_drafted(make_engine: MakeEngine) -> None:
    keys = {"description": {"type": "boolean"}, "quantity": {"type": "boolean"}}
    schema = {"type": "object", "properties": keys, "required": list(keys), "additionalProperties": False}
    asked = [
        Asked(PROMPT, SamplingParams(seed=i, max_tokens=60, grammar=Grammar.json_schema(schema)))
        for i in range(3)
    ]
    auto, off = make_engine("qwen3", speculation="auto"), make_engine("qwen3", speculation="off")
    for engine in (auto, off):
        asyncio.run(engine.prepare(asked[0].params))
    drafted, plain = run(auto, asked), run(off, asked)
    assert everything(drafted) == everything(plain)
    by = Counter(t.drafter for [c] in drafted for t in c.tokens)
    assert by["grammar"] > 20, "most of the keys' letters"


def test_weights_swapped_under_running_drafts(tiny_model: Callable[[str], Path]) -> None:
    """Versions never go back, and the same weights under another number draw the same tokens."""
    folder = str(tiny_model("llama"))
    params = SamplingParams(seed=3, max_tokens=300, ignore_eos=True)
    engine = Engine.from_pretrained(folder, EngineConfig(num_blocks=128, speculation="4"))
    try:
        [[plain]] = run(engine, [Asked(PROMPT, params)])

        async def swap_midway() -> Completion:
            stream = engine.submit(PROMPT, params)
            first = await anext(stream)
            await engine.update_weights(folder, mode="keep")
            rest = (await collect(stream))[0]
            rest.tokens = [*first.tokens, *rest.tokens]
            return rest

        with drafting(engine, "mixed", [[plain.ids]]):
            done = asyncio.run(swap_midway())
        versions = [t.weight_version for t in done.tokens]
        assert versions == sorted(versions) and set(versions) == {0, 1}
        assert done.numbers == plain.numbers
    finally:
        engine.shutdown()


def test_drafters_are_told_token_by_token(make_engine: MakeEngine) -> None:
    forced = make_engine("llama", speculation="4")
    asked = [Asked(PROMPT, SamplingParams(seed=1, max_tokens=30, ignore_eos=True))]
    plain = run(make_engine("llama", speculation="off"), asked)
    assert {t.drafter for t in plain[0][0].tokens} == {None}
    [[done]] = run_drafting(forced, asked, "right", plain)
    assert done.metrics is not None
    drafted = [t.drafter for t in done.tokens]
    assert drafted[0] is None, "the first token comes with the prompt"
    assert drafted.count("forced") == done.metrics.num_accepted_tokens == 30 - 1 - drafted[1:].count(None)
    assert done.metrics.num_draft_tokens == done.metrics.num_accepted_tokens


def test_an_error_inside_a_draft_leaves_the_tokens_before_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = make_engine("llama", speculation="4")
    asked = [Asked(PROMPT, SamplingParams(seed=i, max_tokens=30, ignore_eos=True)) for i in (666, 5)]
    plain = run(make_engine("llama", speculation="off"), asked)
    sample = forced.runner.sampler.sample

    def spoil(logits: torch.Tensor, rows: Any, places: Any) -> Any:
        logits = logits[places].clone()
        for b, row in enumerate(rows):
            if row.noise.seed == 666 and row.num_completion_tokens == 7:
                logits[b, 3] = float("nan")
        return sample(logits, rows)

    monkeypatch.setattr(forced.runner.sampler, "sample", spoil)
    [[failed], [whole]] = run_drafting(forced, asked, "right", plain)
    assert failed.finish_reason == "error" and failed.ids == plain[0][0].ids[:7]
    assert everything([[whole]]) == everything([plain[1]])


def chi_square(engine: Engine, kind: Kind, model: torch.nn.Module, rounds: int, n: int = 1000) -> float:
    """Draw many completions of 4 tokens out of 4, with drafts; return the p-value of all contexts' counts together."""
    allowed, length = (10, 20, 30, 40), 4
    params = SamplingParams(max_tokens=length, allowed_token_ids=allowed, ignore_eos=True, temperature=2.0)
    seen: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for number in range(rounds):
        asked = [Asked(PROMPT[:8], SamplingParams(**_fields(params) | {"seed": number}), n=n)]
        guesses = [[[allowed[(number + i + j) % 4] for j in range(length)] for i in range(n)]]
        with drafting(engine, kind, guesses):
            for choice in run(engine, asked)[0]:
                for i, token_id in enumerate(choice.ids):
                    seen[tuple(choice.ids[:i])][token_id] += 1
    statistic, freedom = 0.0, 0
    with torch.inference_mode():
        for context, drawn in seen.items():
            logits = model(torch.tensor([PROMPT[:8] + list(context)])).logits[0, -1, list(allowed)]
            chances = (logits.double() / 2.0).softmax(-1)
            total = sum(drawn.values())
            statistic += sum(
                (drawn[a] - total * float(c)) ** 2 / (total * float(c))
                for a, c in zip(allowed, chances, strict=True)
            )
            freedom += len(allowed) - 1
    return float(stats.chi2.sf(statistic, freedom))


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {field.name: getattr(params, field.name) for field in fields(params) if field.init}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rounds", [5, thorough(25)], ids=["20,000", "100,000"])
def test_the_draws_have_the_models_distribution(rounds: int, make_engine: MakeEngine, hf_model: Any) -> None:
    engine = make_engine("llama", speculation="3", prefix_caching=True)
    before = counts(engine)
    assert chi_square(engine, "right", hf_model("llama"), rounds=rounds) > 1e-4
    drafted, accepted = (now - then for now, then in zip(counts(engine), before, strict=True))
    assert 0.1 < accepted / drafted < 0.9, "guesses, some right and some wrong"


def test_control_believed_drafts_have_another_distribution(
    make_engine: MakeEngine, hf_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def believe(batch: Any, draw: int, depth: int, token_id: int) -> bool:
        return depth < len(batch.scheduled[batch.draws[draw][1]].draft)

    monkeypatch.setattr(drawing, "_is_right", believe)
    engine = make_engine("llama", speculation="3", prefix_caching=True)
    # few at once: steps of many rows carry no drafts
    assert chi_square(engine, "wrong", hf_model("llama"), rounds=30, n=32) < 1e-6


def test_options_that_exclude_each_other_are_refused_in_one_sentence() -> None:
    with pytest.raises(RequestError, match="speculation=4 cannot be had with exact=off"):
        EngineConfig(speculation="4", exact="off")
    with pytest.raises(RequestError, match="speculation must be one of auto, off"):
        EngineConfig(speculation="99")


def test_without_exactness_nothing_is_drafted(make_engine: MakeEngine) -> None:
    assert make_engine("llama", exact="off").scheduler.speculation is None
