"""The engine as its callers see it: parity with transformers, n, stopping, aborts, and errors that stay one's own."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import set_seed

from myserve.core.logprobs import PROMPT_CHUNK
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.errors import (
    ContextLengthError,
    EngineDeadError,
    NonFiniteLogitsError,
    OverloadedError,
    RequestError,
)
from runs import Asked, collect, run, run_one, thorough
from warm_python import warm_python

PROMPT = [5, 7, 100, 200, 33, 41, 90, 12]
EVERY_ARCHITECTURE = [
    "llama", *map(thorough, ("qwen2", "qwen3", "mistral", "gemma2", "olmo2", "olmoe")), "gemma3_text", "gpt2",
    "qwen3_moe", "mixtral",
]  # fmt: skip
MakeEngine = Callable[..., Engine]
HfModel = Callable[[str], Any]


def generated(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """What transformers.generate adds to the prompt."""
    out = model.generate(torch.tensor([prompt]), pad_token_id=0, **options)
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("arch", EVERY_ARCHITECTURE)
def test_greedy_is_transformers_greedy(arch: str, make_engine: MakeEngine, hf_model: HfModel) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT * 6]  # together, and longer than the sliding window
    done = run(make_engine(arch), [Asked(p, SamplingParams(temperature=0, max_tokens=40)) for p in prompts])
    for prompt, [completion] in zip(prompts, done, strict=True):
        assert completion.ids == generated(hf_model(arch), prompt, do_sample=False, max_new_tokens=40)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe"])
def test_torch_noise_draws_what_generate_draws(arch: str, make_engine: MakeEngine, hf_model: HfModel) -> None:
    mixes: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.3, "top_p": 0.95},
    ]
    model = hf_model(arch)
    asked = [
        Asked(PROMPT[: 4 + i], SamplingParams(max_tokens=48, seed=i, noise="torch", **mix))
        for i, mix in enumerate(mixes)
    ]
    for i, (mix, [completion]) in enumerate(zip(mixes, run(make_engine(arch), asked), strict=True)):
        set_seed(i)
        theirs = generated(model, PROMPT[: 4 + i], do_sample=True, max_new_tokens=48, **({"top_k": 0} | mix))
        assert completion.ids == theirs, f"{arch}, {mix}"


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mixtral"])
def test_logprob_is_the_models_own(arch: str, make_engine: MakeEngine, hf_model: HfModel) -> None:
    completion = run_one(make_engine(arch), PROMPT, max_tokens=24, seed=1, temperature=0.5, top_logprobs=3)
    ids = torch.tensor([PROMPT + completion.ids])
    with torch.no_grad():
        logprobs = hf_model(arch)(ids).logits[0].float().log_softmax(-1)[len(PROMPT) - 1 : -1]
    drawn = torch.tensor(completion.ids)
    raw = torch.tensor([t.logprob for t in completion.tokens])
    torch.testing.assert_close(raw, logprobs.gather(1, drawn[:, None])[:, 0], atol=2e-5, rtol=0)
    behaviour = (logprobs / 0.5).log_softmax(-1).gather(1, drawn[:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor([t.sampling_logprob for t in completion.tokens]), behaviour, atol=5e-5, rtol=0
    )
    for row, token in zip(logprobs, completion.tokens, strict=True):
        assert [i for i, _ in token.top_logprobs] == row.topk(3).indices.tolist()


def test_prompt_logprobs_are_the_models_own(make_engine: MakeEngine, hf_model: HfModel) -> None:
    prompt = PROMPT * 9  # chunked: 72 tokens in steps of 20
    engine = make_engine(max_num_batched_tokens=20, max_num_seqs=4, prefill_chunk=20)
    completion = run_one(engine, prompt, max_tokens=2, prompt_logprobs=2, seed=0)
    scores = next(d.prompt_logprobs for d in completion.deltas if d.prompt_logprobs is not None)
    with torch.no_grad():
        logprobs = hf_model("llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)[:-1]
    assert [s.token_id for s in scores] == prompt
    assert scores[0].logprob is None
    theirs = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([s.logprob for s in scores[1:]]), theirs, atol=2e-5, rtol=0)
    assert [i for i, _ in scores[5].top_logprobs] == logprobs[4].topk(2).indices.tolist()


def test_a_prompt_is_scored_in_tiles_of_logits(make_engine: MakeEngine) -> None:
    """However long the chunk, no more than `PROMPT_CHUNK` rows of logits exist at once."""
    engine = make_engine("gemma2", max_num_batched_tokens=512)
    rows: list[int] = []
    head = engine.runner.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: rows.append(out.numel() // out.shape[-1]))
    try:
        prompt = [5 + i % 300 for i in range(400)]
        completion = run_one(engine, prompt, max_tokens=1, prompt_logprobs=1, seed=0)
    finally:
        hook.remove()
    scores = next(d.prompt_logprobs for d in completion.deltas if d.prompt_logprobs is not None)
    assert len(scores) == len(prompt)
    assert max(rows) == PROMPT_CHUNK, "the scores come in whole tiles"
    assert sum(rows) == len(prompt), "399 targets and one draw: nothing is computed twice"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 500, 512])
def test_a_prompt_is_scored_and_nothing_is_drawn(
    n: int, length: int, make_engine: MakeEngine, hf_model: HfModel
) -> None:
    """It may fill the context: there is nothing that would have to fit behind it."""
    engine = make_engine(max_num_batched_tokens=128, prefill_chunk=64)
    prompt = [5 + i * i % 300 for i in range(length)]
    asked = Asked(prompt, SamplingParams(max_tokens=0, prompt_logprobs=2), n)
    other = Asked(PROMPT, SamplingParams(max_tokens=40, seed=1, ignore_eos=True))
    choices, [beside] = run(engine, [asked, other])
    assert [(c.finish_reason, c.ids, c.text) for c in choices] == [("length", [], "")] * n
    scores = next(d.prompt_logprobs for d in choices[0].deltas if d.prompt_logprobs is not None)
    assert [s.token_id for s in scores] == prompt and scores[0].logprob is None
    with torch.no_grad():
        theirs = hf_model("llama")(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    for position, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(theirs[position, prompt[position + 1]].item(), abs=1e-4)
    assert beside.numbers == run(engine, [other])[0][0].numbers
    engine.scheduler.check_integrity()


def test_n_choices_differ_and_each_is_what_its_sample_index_says(make_engine: MakeEngine) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=16, seed=11)
    [choices] = run(engine, [Asked(PROMPT, params, n=4)])
    assert len({tuple(c.ids) for c in choices}) == 4

    async def alone(index: int) -> Any:
        return (await collect(engine.submit(PROMPT, params, SubmitOptions(sample_index=index))))[0]

    assert [asyncio.run(alone(i)).numbers for i in range(4)] == [c.numbers for c in choices]


def test_a_request_without_a_seed_says_which_it_used(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first, second = (run_one(engine, PROMPT, max_tokens=12) for _ in range(2))
    assert first.seed != second.seed
    assert run_one(engine, PROMPT, max_tokens=12, seed=first.seed).numbers == first.numbers


def test_prior_tokens_go_on_as_if_never_cut(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for noise in ("counter", "torch"):
        params: dict[str, Any] = {"seed": 4, "noise": noise, "frequency_penalty": 0.7, "top_p": 0.9}
        whole = run_one(engine, PROMPT, max_tokens=20, ignore_eos=True, **params)

        async def rest(params: dict[str, Any] = params, whole: Any = whole) -> Any:
            begun = PROMPT + whole.ids[:7]
            sampling = SamplingParams(max_tokens=13, ignore_eos=True, **params)
            return (await collect(engine.submit(begun, sampling, SubmitOptions(num_prior_tokens=7))))[0]

        assert asyncio.run(rest()).numbers == whole.numbers[7:]


def test_eos_and_stop_ids_end_a_completion_and_have_no_text(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = run_one(engine, PROMPT, max_tokens=30, temperature=0, ignore_eos=True)
    stop_id = next(t for i, t in enumerate(free.ids) if i >= 5 and t not in free.ids[:i])
    at = free.ids.index(stop_id)
    stopped = run_one(
        engine, PROMPT, max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=(stop_id,)
    )
    assert (stopped.ids, stopped.finish_reason, stopped.stop_reason) == (free.ids[: at + 1], "stop", stop_id)
    assert [t.token_id for t in stopped.shown] == free.ids[:at]
    shown = run_one(
        engine, PROMPT, max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=(stop_id,),
        include_stop_str_in_output=True,
    )  # fmt: skip
    assert [t.token_id for t in shown.shown] == free.ids[: at + 1]


def test_every_eos_of_the_generation_config_counts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    biased = {engine.eos_token_ids[-1]: 100.0}
    ended = run_one(engine, PROMPT, max_tokens=30, logit_bias=biased)
    assert (ended.ids, ended.text, ended.finish_reason, ended.stop_reason) == ([2], "", "stop", None)
    late = run_one(engine, PROMPT, max_tokens=30, min_tokens=4, logit_bias=biased)
    assert (len(late.ids), late.ids[-1]) == (5, 2)


def test_a_stop_string_ends_the_text_before_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = run_one(engine, PROMPT, max_tokens=40, seed=2, ignore_eos=True)
    stop = free.text[9:13]
    stopped = run_one(engine, PROMPT, max_tokens=40, seed=2, ignore_eos=True, stop=(stop,))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.ids == free.ids[: len(stopped.ids)]
    assert engine.token_bytes.text([t.token_id for t in stopped.shown]).startswith(stopped.text)


def test_the_text_is_the_bytes_of_the_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    completion = run_one(engine, PROMPT, max_tokens=60, seed=3, ignore_eos=True, temperature=1.5)
    assert completion.text == engine.token_bytes.text(completion.ids)
    for delta in completion.deltas[:-1]:
        assert "\ufffd" not in delta.text or len(delta.tokens) > 0
        delta.text.encode()  # no half of a surrogate pair either


def test_an_abort_ends_a_request_and_gives_its_blocks_back(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=64)

    async def abort_midway() -> Any:
        stream = engine.submit(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True), SubmitOptions(n=2))
        deltas = []
        async for delta in stream:
            deltas.append(delta)
            if len(deltas) == 5:
                stream.abort()
        return deltas

    deltas = asyncio.run(abort_midway())
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["abort", "abort"]
    # the engine has taken the abort in by the time that it has run this
    run_one(engine, PROMPT, max_tokens=1)
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_free == 64


def test_a_nan_row_fails_alone(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    plain = run_one(engine, PROMPT, max_tokens=8, seed=5)
    sample = engine.runner.sampler.sample

    def spoil_one(logits: torch.Tensor, rows: Any, places: Any) -> Any:
        sick = [i for i, row in enumerate(rows) if row.params.seed == 666 and row.num_completion_tokens == 3]
        logits = logits[places].clone()
        logits[sick] = float("nan")
        return sample(logits, rows)

    monkeypatch.setattr(engine.runner.sampler, "sample", spoil_one)
    [sick], [well] = run(
        engine,
        [
            Asked(PROMPT, SamplingParams(max_tokens=8, seed=666)),
            Asked(PROMPT, SamplingParams(max_tokens=8, seed=5)),
        ],
    )
    assert (sick.finish_reason, len(sick.ids)) == ("error", 3)
    assert isinstance(sick.error, NonFiniteLogitsError)
    assert well.numbers == plain.numbers


def test_what_cannot_be_asked_is_refused_and_says_why(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def submit(prompt: Any, **asked: Any) -> None:
        of_submit = {
            name: asked.pop(name) for name in ("n", "sample_index", "num_prior_tokens") if name in asked
        }
        engine.submit(prompt, SamplingParams(**asked), SubmitOptions(**of_submit))

    for prompt, params, error, words in [
        ([], {}, RequestError, "the prompt has no tokens"),
        ([384], {}, RequestError, "token id 384, which is out of vocabulary: this model's ids are 0 to 383"),
        ([-1], {}, RequestError, "token id -1"),
        ([5.0], {}, RequestError, "the prompt must be integers"),
        ("text", {}, RequestError, "the prompt must be integers"),
        ([5] * 600, {}, ContextLengthError, "maximum context length is 512"),
        ([5] * 500, {"max_tokens": 13}, ContextLengthError, "ask for at most 12"),
        ([5] * 512, {}, ContextLengthError, "so that at least one token fits"),
        (
            [5] * 513,
            {"max_tokens": 0, "prompt_logprobs": 0},
            ContextLengthError,
            "maximum context length is 512",
        ),
        ([5], {"min_tokens": 2**31 - 1}, RequestError, "min_tokens must be in \\[0, 511\\]"),
        ([5], {"logit_bias": {999: 1.0}}, RequestError, "logit_bias"),
        ([5], {"n": 0}, RequestError, "n must be in"),
        ([5], {"sample_index": 2**32}, RequestError, "sample_index must be in"),
        ([5], {"num_prior_tokens": 1}, RequestError, "num_prior_tokens must be in"),
    ]:
        with pytest.raises(error, match=words):
            asyncio.run(submit(prompt, **params))


def test_a_full_queue_says_when_to_come_back(make_engine: MakeEngine) -> None:
    engine = make_engine(max_queue=3)

    async def overfill() -> None:
        streams = [engine.submit(PROMPT, SamplingParams(max_tokens=5)) for _ in range(3)]
        with pytest.raises(OverloadedError) as refused:
            engine.submit(PROMPT, SamplingParams(max_tokens=5))
        assert refused.value.retry_after >= 1
        await asyncio.gather(*(collect(stream) for stream in streams))
        await asyncio.sleep(0.1)
        await collect(engine.submit(PROMPT, SamplingParams(max_tokens=5)))

    asyncio.run(overfill())


def test_a_dead_engine_tells_everyone(
    tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_pretrained(str(tiny_model("llama")), EngineConfig(num_blocks=16))
    monkeypatch.setattr(engine.runner, "run", lambda batch: 1 / 0)
    waiting = run_one(engine, PROMPT, max_tokens=3)
    assert (waiting.finish_reason, type(waiting.error)) == ("error", EngineDeadError)
    assert "ZeroDivisionError" in str(waiting.error)
    assert not engine.is_alive
    with pytest.raises(EngineDeadError):
        run_one(engine, PROMPT, max_tokens=3)


ENDS_IN_MID_STEP = """
import asyncio
from myserve.core.params import SamplingParams
from myserve.embedded import embedded_model_path
from myserve.engine import Engine

async def main():
    engine = Engine.from_pretrained(str(embedded_model_path()))
    async for _ in engine.submit([1, 2, 3], SamplingParams(max_tokens=3000, ignore_eos=True)):
        return engine

engine = asyncio.run(main())
"""


def test_a_process_that_ends_while_the_engine_computes_ends_well() -> None:
    """Without an end of the engine's own, one in three is aborted."""
    scripts = [
        subprocess.Popen([*warm_python(), "-c", ENDS_IN_MID_STEP], stderr=subprocess.PIPE) for _ in range(3)
    ]
    for script in scripts:
        _, said = script.communicate(timeout=100)
        assert (script.returncode, b"terminate" in said) == (0, False)


def test_metrics_tell_what_a_request_cost(make_engine: MakeEngine) -> None:
    engine = make_engine(prefill_chunk=64, max_num_batched_tokens=128)
    prompt = [9, 8, 7, 6] * 20
    first, again = (run_one(engine, prompt, max_tokens=4, temperature=0, ignore_eos=True) for _ in range(2))
    assert first.metrics is not None and again.metrics is not None
    assert (first.metrics.prompt_tokens, first.metrics.cached_tokens) == (80, 0)
    assert again.metrics.cached_tokens == 64
    assert first.metrics.time_to_first_token >= first.metrics.prefill_duration > 0
    assert first.metrics.generation_duration > 0


def test_without_prefix_caching_nothing_is_found_again(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_caching=False)
    done = [run_one(engine, PROMPT * 8, max_tokens=2) for _ in range(2)]
    assert [c.metrics.cached_tokens for c in done if c.metrics] == [0, 0]


def test_a_prefix_is_found_by_its_own_client_alone_unless_it_is_shared(make_engine: MakeEngine) -> None:
    """One key owner could time, or read off `cached_tokens`, what another has asked."""

    async def cached(engine: Engine, client: str, salt: str = "") -> int:
        stream = engine.submit(
            PROMPT * 8, SamplingParams(max_tokens=2), SubmitOptions(client=client, cache_salt=salt)
        )
        [choice] = await collect(stream)
        assert choice.metrics is not None
        return choice.metrics.cached_tokens

    apart, shared = make_engine(max_queue=77), make_engine(max_queue=77, share_prefix_cache=True)
    assert asyncio.run(cached(apart, "alice")) == 0
    assert asyncio.run(cached(apart, "alice")) == 32
    assert asyncio.run(cached(apart, "bob")) == 0
    assert asyncio.run(cached(apart, "alice", "her own")) == 0
    assert [asyncio.run(cached(shared, client)) for client in ("alice", "bob")] == [0, 32]  # the control
    assert asyncio.run(cached(shared, "bob", "his own")) == 0


def test_a_request_says_how_full_the_cache_was_when_it_ended(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=32)
    long = Asked(PROMPT * 4, SamplingParams(max_tokens=300, ignore_eos=True))
    short = Asked(PROMPT[:2], SamplingParams(max_tokens=1))
    [[last], [first]] = run(engine, [long, short])
    assert first.metrics is not None and last.metrics is not None
    assert 0 < first.metrics.kv_cache_usage < 1  # the long one's blocks
    assert last.metrics.kv_cache_usage == 0  # nobody is left


def test_a_context_that_ends_before_the_one_that_was_asked_for_is_said(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "myserve"):
        own = make_engine("llama", num_blocks=64).max_model_len
        assert not caplog.records
        assert make_engine("llama", num_blocks=64, max_model_len=10 * own).max_model_len == own
        assert f"contexts end at {own} tokens, not at the {10 * own} of max_model_len" in caplog.text
