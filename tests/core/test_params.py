"""Every field of SamplingParams: what is taken, what is refused, and that the refusal names field, value and range."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from myserve.core.grammar import Grammar, Reasoning
from myserve.core.params import SamplingParams
from myserve.core.ranges import ranges_of, shown
from myserve.core.waterfall import WaterfallOptions
from myserve.engine.requests.options import SubmitOptions
from myserve.errors import RequestError

ACCEPTED: dict[str, list[object]] = {
    "max_tokens": [None, 1, 10**6, 2**31 - 1],
    "min_tokens": [0, 5],
    "stop": [(), ("a",), tuple(str(i) for i in range(16))],
    "stop_token_ids": [(), (0, 7)],
    "shown_special_ids": [(), (0, 7)],
    "ignore_eos": [True],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [False],
    "allowed_token_ids": [None, (3,)],
    "bad_words_ids": [(), ((1,), (2, 3))],
    "grammar": [None, Grammar.json_object(), Grammar("regex", "a")],
    "reasoning": [None, Reasoning(), Reasoning(budget=0, starts_inside=True)],
    "logit_bias": [{}, {5: -100.0}, {5: 100}],
    "repetition_penalty": [1.0, 1e-6, 100.0],
    "frequency_penalty": [-2.0, 2.0, 0],
    "presence_penalty": [-2.0, 2.0],
    "temperature": [0, 0.0, 1e-300, 100.0],
    "top_k": [None, 0, -1, 1, 10**9],
    "top_p": [0.0, 0.5, 1],
    "min_p": [0.0, 1.0],
    "typical_p": [1.0, 1e-9],
    "top_n_sigma": [None, 0.5],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "noise": ["counter", "torch"],
    "top_logprobs": [0, 1024],
    "logprobs_mode": ["raw", "processed"],
    "logprob_token_ids": [(), (9,)],
    "kept": [True],
    "routed_experts": [True],
    "ranks": [True],
    "entropies": [True],
    "waterfall": [None, WaterfallOptions(at=3)],
    "prompt_logprobs": [None, 0, 1024],
    "prompt_logprob_start": [0, 7],
    "prompt_logprob_token_ids": [(), ((5, 6),), ((5,), (6,))],
}

REFUSED: dict[str, list[object]] = {
    "max_tokens": [0, -1, 1.5, "8", True, 2**31, 10**4000],
    "min_tokens": [-1, None, 2**31, 1.0],
    "stop": ["a", ("",), ("a",) * 17, (1,)],
    "stop_token_ids": [(-1,), (2**31,), [1], (1.0,)],
    "shown_special_ids": [(-1,), [1], (1.0,)],
    "allowed_token_ids": [(), (-1,)],
    "bad_words_ids": [((),), ((-1,),)],
    "grammar": ["[a-z]", {"type": "object"}],
    "reasoning": [True, "<think>"],
    "logit_bias": [
        {-1: 1.0},
        {1: math.nan},
        {1: math.inf},
        {1: "2"},
        {True: 1.0},
        {1: 10**400},
        {2**31: 1.0},
    ],
    "repetition_penalty": [0.0, 1e-7, -1.0, 100.1, math.nan],
    "frequency_penalty": [-2.01, 2.01, math.nan, "1"],
    "presence_penalty": [-2.01, 2.01, True],
    "temperature": [-1e-9, 100.1, math.nan, math.inf, None, "hot", 10**4000],
    "top_k": [-2, 1.0, True, 2**31, 2**63, 10**4000],
    "top_p": [-0.1, 1.1, math.nan],
    "min_p": [-0.1, 1.1],
    "typical_p": [0.0, 1.1],
    "top_n_sigma": [0.0, -1.0, math.inf, 1.1e6],
    "seed": [2**64, -(2**63) - 1, 1.0, 10**4000],
    "noise": ["random", None],
    "ignore_eos": [None, 1],
    "include_stop_str_in_output": ["yes"],
    "skip_special_tokens": [None],
    "kept": [1],
    "routed_experts": [[]],
    "ranks": [1],
    "entropies": [0],
    "waterfall": [True, (3, 20)],
    "top_logprobs": [-1, 1025, True, 2**64],
    "logprobs_mode": ["cooked"],
    "logprob_token_ids": [(-1,)],
    "prompt_logprobs": [-1, 1025, 2**64],
    "prompt_logprob_start": [-1, 2**31],
    "prompt_logprob_token_ids": [((-1,),), ((1,), (2, 3))],
}


def test_every_field_is_in_these_tables() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams) if field.init}
    assert names == set(ACCEPTED)
    assert names == set(REFUSED)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ACCEPTED.items() for v in values])
def test_accepts_and_keeps_as_given(name: str, value: object) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values])
def test_refuses_and_names_the_field(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]  # any field
    assert caught.value.param == name
    assert caught.value.message.startswith(f"{name} ")


def test_message_gives_value_and_range() -> None:
    with pytest.raises(RequestError, match=r"^frequency_penalty must be in \[-2, 2\], got 2.5$"):
        SamplingParams(frequency_penalty=2.5)
    with pytest.raises(RequestError, match=r"^typical_p must be in \(0, 1\], got 0.0$"):
        SamplingParams(typical_p=0.0)
    with pytest.raises(
        RequestError, match=r"^max_tokens must be in \[1, 2147483647\], got 0; only to score a prompt"
    ):
        SamplingParams(max_tokens=0)
    with pytest.raises(RequestError, match=r"^min_tokens must be in \[0, 4\], which is max_tokens, got 5$"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_every_number_has_a_range_that_its_field_declares() -> None:
    """A new field of numbers without a range fails here: nothing may reach a tensor unbounded."""
    for cls in (SamplingParams, SubmitOptions):
        numbers = {
            field.name
            for field in dataclasses.fields(cls)
            if {"int", "float"} & set(str(field.type).replace("|", " ").split())
        }
        assert numbers == set(ranges_of(cls))


@pytest.mark.parametrize("cls", [SamplingParams, SubmitOptions])
def test_one_step_beyond_either_end_of_every_range_is_refused(cls: type) -> None:
    for name, allowed in ranges_of(cls).items():
        step = 1 if allowed.is_integer else 1e-9 * max(1.0, abs(allowed.high))
        for value in (allowed.low - step, allowed.high + step, 2**64, -(2**64), 10**5000):
            with pytest.raises(RequestError) as caught:
                cls(**{name: value})
            assert caught.value.param == name
            assert f"must be in {allowed}, got {shown(value)}" in caught.value.message


def test_the_documented_ranges_are_the_fields() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    for cls in (SamplingParams, SubmitOptions):
        for name, allowed in ranges_of(cls).items():
            assert f"\n| `{name}` | {allowed}" in page


def test_logit_bias_beyond_the_range_counts_as_its_end() -> None:
    assert SamplingParams(logit_bias={1: 1000.0, 2: -1000}).logit_bias == {1: 100.0, 2: -100.0}


def test_frozen_against_the_callers_own_mapping() -> None:
    mine = {1: 1.0}
    params = SamplingParams(logit_bias=mine)
    mine[1] = 50.0
    assert params.logit_bias == {1: 1.0}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(stop_token_ids=(8,)),
        SamplingParams(allowed_token_ids=(8,)),
        SamplingParams(bad_words_ids=((1, 8),)),
        SamplingParams(logit_bias={8: 1.0}),
        SamplingParams(logprob_token_ids=(8,)),
    ],
)
def test_ids_outside_the_vocabulary(params: SamplingParams) -> None:
    params.check_vocabulary(9)
    with pytest.raises(RequestError, match=r"names token id 8; the model's ids are 0 to 7"):
        params.check_vocabulary(8)
