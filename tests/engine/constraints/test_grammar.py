"""A grammar holds for every completion, in any company; what it cuts shows in the behaviour's logprob alone."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myserve.core.grammar import Grammar, Reasoning
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.constraints.grammar import GrammarConstraint
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.errors import ConstraintError, RequestError
from runs import Asked, Completion, collect, run, run_one

MakeEngine = Callable[..., Engine]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "minItems": 1},
        "home": {"type": "object", "properties": {"zip": {"type": "string"}}, "required": ["zip"]},
    },
    "required": ["name", "age", "pets", "home"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar.json_schema(PERSON),
    Grammar.json_object(),
    Grammar("regex", r"[a-z]{3,}(-[0-9]+)*!"),
    Grammar.choice(["yes", "no", 'a "quoted"\nline', "🦄 <|im_end|>"]),
    Grammar("lark", 'start: "(" start ")" | /[a-f]+/'),
    Grammar("lark", 'root ::= "do " ("re" | "mi")+ "."'),  # GBNF
]
PROMPT = list(range(60, 95))


def asked(count: int, **more: Any) -> list[Asked]:
    """Requests under every grammar, and some under none between them."""
    requests = []
    for i in range(count):
        grammar = [*GRAMMARS, None][i % 7]
        params: dict[str, Any] = {"seed": i, "max_tokens": 90, "grammar": grammar}
        params["temperature"] = [1.0, 0.0, 1.6][i % 3]
        params["top_p"] = [1.0, 0.9][i % 2]
        params["noise"] = "torch" if i % 5 == 4 else "counter"
        params["frequency_penalty"] = 0.3 if i % 4 == 1 else 0.0
        requests.append(Asked(PROMPT[: 5 + 4 * i % 30], SamplingParams(**(params | more))))
    return requests


def numbers(completions: list[list[Completion]]) -> list[Any]:
    return [[(c.numbers, c.finish_reason, c.text) for c in choices] for choices in completions]


def fits(grammar: Grammar | None, text: str) -> bool:
    if grammar is GRAMMARS[0]:
        person = json.loads(text)
        return list(person) == ["name", "age", "pets", "home"] and isinstance(person["age"], int)
    if grammar is GRAMMARS[1]:
        return isinstance(json.loads(text), dict)
    if grammar is GRAMMARS[2]:
        return re.fullmatch(r"[a-z]{3,}(-[0-9]+)*!", text) is not None
    if grammar is GRAMMARS[3]:
        return text in ["yes", "no", 'a "quoted"\nline', "🦄 <|im_end|>"]
    if grammar is GRAMMARS[4]:
        return re.fullmatch(r"(\()*[a-f]+(\))*", text) is not None and text.count("(") == text.count(")")
    if grammar is GRAMMARS[5]:
        return re.fullmatch(r"do (re|mi)+\.", text) is not None
    return True


# -- what comes out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_keeps_to_every_grammar(make_engine: MakeEngine, seed: int) -> None:
    requests = asked(28)
    for i, one in enumerate(requests):
        object.__setattr__(one.params, "seed", 1000 * seed + i)
    for one, [done] in zip(requests, run(make_engine(), requests), strict=True):
        assert done.error is None
        if one.params.grammar is not None:
            assert done.finish_reason == "stop"
            assert fits(one.params.grammar, done.text), done.text


def test_control_without_the_grammar_it_does_not(make_engine: MakeEngine) -> None:
    requests = asked(7, grammar=None)
    texts = [done.text for [done] in run(make_engine(), requests)]
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(texts[0])
    assert not fits(GRAMMARS[2], texts[2])


@pytest.mark.parametrize("max_tokens", [24, 40, 80, 160])
def test_an_object_is_whole_whatever_max_tokens_is(make_engine: MakeEngine, max_tokens: int) -> None:
    grammar = Grammar.json_schema(
        {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "object"}}},
            "required": ["a", "b"],
        }
    )
    params = SamplingParams(max_tokens=max_tokens, grammar=grammar, seed=4)
    [choices] = run(make_engine(), [Asked(PROMPT, params, n=8)])
    for done in choices:
        assert done.finish_reason == "stop"
        assert {"a", "b"} <= set(json.loads(done.text))
        assert len(done.tokens) <= max_tokens
    assert any(done.stop_reason == "max_tokens" for done in choices), "random text never ends by itself"


def test_what_cannot_be_whole_in_max_tokens_ends_by_length(make_engine: MakeEngine) -> None:
    done = run_one(make_engine(), PROMPT, max_tokens=6, grammar=GRAMMARS[0], seed=1)
    assert (done.finish_reason, done.stop_reason, len(done.tokens)) == ("length", None, 6)


def test_logprobs_are_raw_before_the_mask_and_normalised_behind_it(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_caching=False)
    params = {"max_tokens": 12, "seed": 3, "top_logprobs": 300}
    done = run_one(engine, PROMPT, grammar=Grammar("regex", "[ab]{4}"), logprobs_mode="processed", **params)
    assert done.tokens[-1].sampling_logprob == 0.0  # the EOS, forced
    for token in done.tokens:
        mass = sum(math.exp(value) for _, value in token.top_logprobs)
        assert abs(mass - 1) < 1e-5
        assert token.logprob < token.sampling_logprob
    scored = run_one(engine, PROMPT + done.ids, max_tokens=1, prompt_logprobs=0)
    raw = next(d.prompt_logprobs for d in scored.deltas if d.prompt_logprobs is not None)
    assert [t.logprob for t in done.tokens] == [t.logprob for t in raw[len(PROMPT) :]]


def test_draws_follow_the_model_within_the_grammar(make_engine: MakeEngine) -> None:
    """The first token's frequencies are the raw distribution's, over what the grammar allows."""
    engine = make_engine()
    grammar = Grammar("regex", "[abc]")
    [choices] = run(engine, [Asked(PROMPT, SamplingParams(max_tokens=3, seed=9, grammar=grammar), n=600)])
    raw = {c.text: math.exp(c.tokens[0].logprob) for c in choices}
    expected = {text: 600 * p / sum(raw.values()) for text, p in raw.items()}
    counts = {text: sum(c.text == text for c in choices) for text in raw}
    assert set(raw) == {"a", "b", "c"}
    # chi-square, 2 df, p = 0.001
    assert sum((counts[t] - expected[t]) ** 2 / expected[t] for t in raw) < 13.8


# -- exactness ------------------------------------------------------------------------------------------------


def test_alone_is_in_company(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_caching=False)
    requests = asked(21)
    assert numbers(run(engine, requests)) == numbers([run(engine, [one])[0] for one in requests])


def test_never_is_often_preempted(make_engine: MakeEngine) -> None:
    requests = asked(14)
    calm = numbers(run(make_engine(prefix_caching=False), requests))
    tight = make_engine(num_blocks=5, max_num_seqs=8)
    assert numbers(run(tight, requests)) == calm
    assert tight.scheduler.num_preemptions > 1, "the pool was not small enough to show anything"


def test_one_is_its_place_among_n(make_engine: MakeEngine) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=100, seed=3, grammar=GRAMMARS[0])
    [many] = run(engine, [Asked(PROMPT, params, n=6)])
    assert len({c.text for c in many}) > 1

    async def just(index: int) -> Completion:
        return (await collect(engine.submit(PROMPT, params, SubmitOptions(sample_index=index))))[0]

    for index in (0, 3, 5):
        assert asyncio.run(just(index)).numbers == many[index].numbers


@pytest.mark.parametrize("reasoning", [None, Reasoning(), Reasoning(starts_inside=True, budget=12)])
def test_a_cut_completion_goes_on_as_if_it_had_never_been_cut(
    make_engine: MakeEngine, reasoning: Reasoning | None
) -> None:
    engine = make_engine()

    def params(left: int) -> SamplingParams:
        return SamplingParams(max_tokens=left, seed=6, grammar=GRAMMARS[0], reasoning=reasoning)

    whole = run(engine, [Asked(PROMPT, params(70))])[0][0]
    assert whole.stop_reason == "max_tokens", "the forced ending is a part of what must be repeated"

    async def rest(cut: int) -> Completion:
        stream = engine.submit(
            PROMPT + whole.ids[:cut], params(70 - cut), SubmitOptions(num_prior_tokens=cut)
        )
        return (await collect(stream))[0]

    for cut in (1, 9, 30, len(whole.ids) - 2):
        assert asyncio.run(rest(cut)).numbers == whole.numbers[cut:]


def test_masks_computed_ahead_are_the_masks(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    requests = asked(14)
    ahead = numbers(run(engine, requests))
    monkeypatch.setattr(engine.runner._masks, "start", lambda constraints: list(constraints))
    assert numbers(run(engine, requests)) == ahead


# -- together with other parameters ---------------------------------------------------------------------------


def test_min_tokens_holds_until_the_grammar_has_no_way_on(make_engine: MakeEngine) -> None:
    engine = make_engine()
    long = run_one(engine, PROMPT, max_tokens=40, min_tokens=12, grammar=Grammar("regex", "a*"), seed=1)
    assert len(long.text) >= 12
    short = run_one(engine, PROMPT, max_tokens=40, min_tokens=12, grammar=Grammar.choice(["yes"]), seed=1)
    assert (short.text, short.finish_reason) == ("yes", "stop")


def test_a_stop_string_cuts_an_object(make_engine: MakeEngine) -> None:
    done = run_one(make_engine(), PROMPT, max_tokens=60, grammar=GRAMMARS[0], seed=1, stop=('"age"',))
    assert (done.finish_reason, done.stop_reason) == ("stop", '"age"')
    assert done.text.lstrip().startswith("{")


def test_constraints_that_leave_nothing_fail_their_request_alone(make_engine: MakeEngine) -> None:
    stuck = Asked(
        PROMPT, SamplingParams(grammar=Grammar.choice(["yes"]), allowed_token_ids=(7,), max_tokens=5)
    )
    [bad], [good] = run(make_engine(), [stuck, asked(1)[0]])
    assert isinstance(bad.error, ConstraintError)
    assert fits(GRAMMARS[0], good.text)


def test_ignore_eos_and_a_grammar_contradict_each_other() -> None:
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(ignore_eos=True, grammar=Grammar.json_object())


# -- what a grammar may not do --------------------------------------------------------------------------------


def test_a_grammar_that_grows_too_costly_fails_alone(make_engine: MakeEngine) -> None:
    # every text has exponentially many readings; each step costs more than the one before
    wild = Grammar("lark", 'start: s "!"\ns: s s s | s s | "a" | "ab" | "b"')
    requests = [
        Asked(
            PROMPT, SamplingParams(grammar=wild, max_tokens=400, seed=1, logit_bias={ord("!") - 30: -100.0})
        ),
        asked(1)[0],
    ]
    [bad], [good] = run(make_engine(), requests)
    assert isinstance(bad.error, ConstraintError)
    assert "too many items" in str(bad.error).lower()
    assert fits(GRAMMARS[0], good.text)


def test_tokens_before_are_taken_without_masks(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask costs a pass through the vocabulary, for each of thousands of tokens, while a loop of events waits."""
    engine = make_engine()
    params = SamplingParams(grammar=GRAMMARS[0], max_tokens=70, seed=6)
    whole = run(engine, [Asked(PROMPT, params)])[0][0]
    monkeypatch.setattr(GrammarConstraint, "prepare", lambda self: pytest.fail("a mask was computed"))
    taken = engine.constraints.begin(params, 70 - 30, whole.ids[:30])
    assert taken is not None and taken.error is None
    with pytest.raises(pytest.fail.Exception):
        taken.mask()


def test_tokens_before_that_do_not_fit_are_refused(make_engine: MakeEngine) -> None:
    async def submit() -> None:
        params = SamplingParams(grammar=Grammar.json_object(), max_tokens=5)
        make_engine().submit(PROMPT, params, SubmitOptions(num_prior_tokens=3))

    with pytest.raises(RequestError, match="do not fit the grammar"):
        asyncio.run(submit())


# -- reasoning ------------------------------------------------------------------------------------------------


def parts(text: str) -> tuple[str, str]:
    thought, mark, answer = text.partition("</think>")
    assert mark, text
    return thought, answer


def test_a_grammar_begins_behind_the_thinking(make_engine: MakeEngine) -> None:
    params = SamplingParams(
        max_tokens=120, seed=2, grammar=GRAMMARS[0], reasoning=Reasoning(starts_inside=True, budget=20)
    )
    for done in run(make_engine(), [Asked(PROMPT, params, n=6)])[0]:
        thought, answer = parts(done.text)
        assert thought
        assert done.finish_reason == "stop"
        assert set(json.loads(answer)) == set(PERSON["properties"])


def test_thinking_ends_in_time_for_the_answer(make_engine: MakeEngine) -> None:
    params = SamplingParams(
        max_tokens=80, seed=2, grammar=GRAMMARS[3], reasoning=Reasoning(starts_inside=True)
    )
    for done in run(make_engine(), [Asked(PROMPT, params, n=6)])[0]:
        assert fits(GRAMMARS[3], parts(done.text)[1].lstrip("\n"))


@pytest.mark.parametrize("budget", [0, 1, 17])
def test_a_budget_counts_tokens_exactly(make_engine: MakeEngine, budget: int) -> None:
    engine = make_engine()
    end = engine.tokenizer.encode("</think>", add_special_tokens=False)
    reasoning = Reasoning(starts_inside=True, budget=budget)
    free = run_one(engine, PROMPT, max_tokens=60, seed=5, ignore_eos=True)
    done = run_one(engine, PROMPT, max_tokens=60, seed=5, ignore_eos=True, reasoning=reasoning)
    assert done.ids[:budget] == free.ids[:budget], "what is thought is not touched"
    assert done.ids[budget : budget + len(end)] == end
    assert all(t.sampling_logprob == 0.0 for t in done.tokens[budget : budget + len(end)])


def test_it_may_answer_without_thinking_first(make_engine: MakeEngine) -> None:
    engine = make_engine()
    start = engine.tokenizer.encode("<think>", add_special_tokens=False)
    params = {"max_tokens": 60, "seed": 5, "grammar": Grammar("regex", "[a-z]+"), "reasoning": Reasoning()}
    at_once = run_one(engine, PROMPT, **params, logit_bias={start[0]: -100.0})
    assert re.fullmatch("[a-z]+", at_once.text)
    thinks = run_one(engine, PROMPT, **params, logit_bias={start[0]: 100.0})
    assert re.fullmatch(r"<think>.*</think>\n*[a-z]+", thinks.text, re.DOTALL)


@pytest.mark.parametrize("named", [[2, 49155], [-1, 2], -1, 49155, [], [384]])
def test_eos_ids_that_are_no_ids_end_nothing_and_break_no_grammar(
    named: object, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """As configs of the hub name them; the tokenizer knows the EOS in each case."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": named}))
    engine = Engine.from_pretrained(str(folder), EngineConfig(num_blocks=32))
    try:
        done = run_one(engine, PROMPT, max_tokens=40, grammar=Grammar("regex", "[a-c]{2,4}"), seed=1)
        assert done.finish_reason == "stop" and re.fullmatch("[a-c]{2,4}", done.text)
        free = run(
            engine, [Asked(PROMPT, SamplingParams(max_tokens=9, min_tokens=9, seed=s)) for s in (1, 2)]
        )
        assert [len(c.ids) for [c] in free] == [9, 9]
    finally:
        engine.shutdown()
