"""Each wire field reaches the sampler under its name, and what contradicts itself is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import pytest

from myserve.core.params import SamplingParams
from myserve.errors import RequestError
from myserve.server.models.echo import CharacterBytes, CharacterTokenizer
from myserve.server.prompts.codec import Codec
from myserve.server.prompts.sampling import chat_params, completion_params, seed_of_prompt
from myserve.wire.chat import ChatCompletionRequest, ChatMessage
from myserve.wire.completions import CompletionRequest

CODEC = Codec(CharacterTokenizer(), cast("Any", CharacterBytes()))


def chat(**fields: Any) -> SamplingParams:
    messages = (ChatMessage(role="user", content="hi"),)
    return chat_params(ChatCompletionRequest(model="m", messages=messages, **fields), CODEC)


def completion(*, room: int = 100, **fields: Any) -> SamplingParams:
    return completion_params(CompletionRequest(model="m", prompt="hi", **fields), CODEC, room=room)


# Each value differs from the default, so a field that is dropped on the way fails.
SENT: dict[str, tuple[Any, str, Any]] = {
    "max_tokens": (5, "max_tokens", 5),
    "min_tokens": (1, "min_tokens", 1),
    "stop": ("x", "stop", ("x",)),
    "stop_token_ids": ((3,), "stop_token_ids", (3,)),
    "ignore_eos": (True, "ignore_eos", True),
    "include_stop_str_in_output": (True, "include_stop_str_in_output", True),
    "skip_special_tokens": (False, "skip_special_tokens", False),
    "allowed_token_ids": ((1, 2), "allowed_token_ids", (1, 2)),
    "bad_words": (("a",), "bad_words_ids", ((97,), (32, 97))),
    "logit_bias": ({"7": -100.0}, "logit_bias", {7: -100.0}),
    "repetition_penalty": (1.5, "repetition_penalty", 1.5),
    "frequency_penalty": (0.5, "frequency_penalty", 0.5),
    "presence_penalty": (-0.5, "presence_penalty", -0.5),
    "temperature": (0.0, "temperature", 0.0),
    "top_k": (3, "top_k", 3),
    "top_p": (0.0, "top_p", 0.0),
    "min_p": (0.1, "min_p", 0.1),
    "typical_p": (0.9, "typical_p", 0.9),
    "top_n_sigma": (1.0, "top_n_sigma", 1.0),
    "seed": (0, "seed", 0),
    "noise": ("torch", "noise", "torch"),
    "logprobs_mode": ("processed", "logprobs_mode", "processed"),
    "logprob_token_ids": ((4,), "logprob_token_ids", (4,)),
    "kept": (True, "kept", True),
    "prompt_logprobs": (0, "prompt_logprobs", 0),
    "include_routing_matrix": (True, "routed_experts", True),
}


@pytest.mark.parametrize("name", SENT)
def test_every_field_arrives(name: str) -> None:
    value, param, expected = SENT[name]
    for params in (chat(**{name: value}), completion(**{name: value})):
        assert getattr(params, param) == expected != getattr(SamplingParams(), param)


def test_the_table_above_is_complete() -> None:
    """Whatever the wire and the sampler both know is tested above."""
    # and what test_structured.py tests
    renamed = {"bad_words_ids", "top_logprobs", "routed_experts", "grammar", "reasoning"}
    # and what test_call_grammars.py tests
    renamed |= {"shown_special_ids"}
    # and what tests/server/routes/test_generate.py tests, of the one route that has it
    renamed |= {"prompt_logprob_start", "prompt_logprob_token_ids"}
    # and what tests/server/routes/test_waterfall.py tests
    renamed |= {"ranks", "entropies", "waterfall"}
    unnamed = {field.name for field in fields(SamplingParams) if field.init} - renamed
    assert unnamed <= set(SENT)


def test_defaults() -> None:
    assert chat() == SamplingParams()
    assert completion() == SamplingParams(max_tokens=16)
    assert completion(room=3) == SamplingParams(max_tokens=3)


def test_logprobs_in_their_three_forms() -> None:
    assert chat(logprobs=True, top_logprobs=3).top_logprobs == 3
    assert completion(logprobs=3).top_logprobs == 3
    assert completion(logprobs=True, top_logprobs=2).top_logprobs == 2
    assert completion(logprobs=0).top_logprobs == 0


def test_an_echo_with_logprobs_scores_the_prompt() -> None:
    assert completion(echo=True, logprobs=2).prompt_logprobs == 2
    assert completion(echo=True).prompt_logprobs is None
    assert completion(echo=True, max_tokens=0).max_tokens == 0
    assert completion(echo=True, max_tokens=0).prompt_logprobs == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logit_bias": {"seven": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-7": 1.0}}, "logit_bias"),
        ({"logit_bias": {"²": 1.0}}, "logit_bias"),
        ({"bad_words": ("",)}, "bad_words"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_refusals_of_chat(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 3, "top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_refusals_of_completions(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_prompts_of_one_request_have_seeds_of_their_own() -> None:
    """The obvious rule, seed + position, gives two requests with neighbouring seeds the same samples."""
    seeds = [seed_of_prompt(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert len({seed + position for seed in range(50) for position in range(50)}) < len(seeds)
