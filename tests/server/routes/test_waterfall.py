"""The waterfall of a token is that of its sample: whatever shaped the draw, the token that was sampled wins again."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

USER = [{"role": "user", "content": "Say a color: red, green, blue."}]
PROMPT = "One, two, three"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 12}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("completion", COMPLETION | {"temperature": 0}),
    "seeded": ("completion", COMPLETION | {"seed": 2**64 - 5, "temperature": 0.8, "top_p": 0.9}),
    "unseeded": ("completion", COMPLETION | {"top_k": 20, "min_p": 0.01}),
    "penalties": (
        "completion",
        COMPLETION
        | {"seed": 3, "frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.5},
    ),
    "bias": ("completion", COMPLETION | {"seed": 4, "logit_bias": {"60": 5, "61": -100}}),
    "bad words": ("completion", COMPLETION | {"seed": 4, "bad_words": ["e", "the"]}),
    "torch noise": ("completion", COMPLETION | {"seed": 4, "noise": "torch", "temperature": 1.3}),
    "min_tokens": (
        "completion",
        COMPLETION | {"seed": 4, "ignore_eos": False, "min_tokens": 11, "logit_bias": {"2": 50}},
    ),
    "several": ("completion", COMPLETION | {"prompt": [[5, 6], [7, 8, 9]], "n": 2, "seed": 9}),
    "chat": ("chat", CHAT | {"seed": 5, "n": 3, "temperature": 1.2}),
    "form": ("chat", CHAT | {"seed": 6, "response_format": FORM}),
    "prior": (
        "completion",
        COMPLETION | {"prompt": [5, 6, 7, 8], "num_prior_tokens": 2, "frequency_penalty": 2, "seed": 1},
    ),
}
PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}


def choices_of(server: Any, kind: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    asked = request | {"return_token_ids": True, "logprobs": True}
    answer = httpx.post(server.url + PATHS[kind], json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def waterfall(server: Any, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + "/v1/waterfall", json=fields, timeout=60)


@pytest.mark.parametrize("name", CASES)
def test_the_sampled_token_wins_again_at_every_place(server: Any, name: str) -> None:
    kind, request = CASES[name]
    for choice in choices_of(server, kind, request):
        ids, entries = choice["token_ids"], choice["logprobs"]["content"]
        asked = {
            kind: request,
            "seed": choice["seed"],
            "choice": choice["index"],
            "completion_token_ids": ids,
        }
        for position in {0, len(ids) - 1} if choice["index"] == 0 else {len(ids) // 2}:
            answer = waterfall(server, **asked, position=position)
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert found["is_same"] is True and found["token_id"] == ids[position]
            assert found["draw"]["token_id"] == ids[position]
            assert found["draw"]["kind"] == ("argmax" if request.get("temperature") == 0 else "race")
            entry = entries[position]
            assert found["logprob"] == entry["logprob"]
            assert found["sampling_logprob"] == entry["sampling_logprob"]
            (token,) = [one for one in found["tokens"] if one["token_id"] == ids[position]]
            assert math.isclose(math.log(token["probabilities"][-1]), entry["sampling_logprob"], abs_tol=2e-6)


def test_a_token_that_was_not_drawn_is_found_out(server: Any) -> None:
    """The control: a changed id is told as such, and a changed seed draws others."""
    _, request = CASES["seeded"]
    (choice,) = choices_of(server, "completion", request)
    ids = list(choice["token_ids"])
    ids[4] = (ids[4] + 1) % 384
    found = waterfall(server, completion=request, completion_token_ids=ids, position=4).json()
    assert found["is_same"] is False and found["token_id"] == choice["token_ids"][4]
    drawn = {
        waterfall(server, completion=request | {"seed": seed}, completion_token_ids=ids[:4]).json()[
            "token_id"
        ]
        for seed in range(12)
    }
    assert len(drawn) > 1


def test_the_next_token_has_a_waterfall_before_it_is_drawn(server: Any) -> None:
    _, request = CASES["seeded"]
    (choice,) = choices_of(server, "completion", request)
    found = waterfall(server, completion=request, completion_token_ids=choice["token_ids"][:5], top=5).json()
    assert found["position"] == 5 and found["is_same"] is None
    assert found["token_id"] == choice["token_ids"][5]
    assert [stage["name"] for stage in found["stages"]] == ["raw", "temperature", "top_p"]
    assert len(found["tokens"]) < 40


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "chat"),
    ({"chat": CHAT, "completion": COMPLETION}, "chat"),
    ({"completion": COMPLETION}, "seed"),
    ({"completion": COMPLETION, "seed": 2**64}, "seed"),
    ({"completion": COMPLETION, "seed": 1, "position": 1}, "position"),
    ({"completion": COMPLETION, "seed": 1, "choice": 1}, "choice"),
    ({"completion": COMPLETION, "seed": 1, "choice": -1}, "choice"),
    ({"completion": COMPLETION, "seed": 1, "top": 0}, "top"),
    ({"completion": COMPLETION, "seed": 1, "top": 201}, "top"),
    ({"completion": COMPLETION, "seed": 1, "completion_token_ids": [999]}, "prompt"),
    ({"completion": COMPLETION, "seed": 1, "completion_token_ids": [5] * 12}, "max_tokens"),
    ({"completion": COMPLETION | {"temperature": -1}, "seed": 1}, "temperature"),
    ({"completion": COMPLETION | {"suffix": "x"}, "seed": 1}, "completion.suffix"),
    ({"chat": CHAT | {"messages": []}, "seed": 1}, "chat.messages"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_what_cannot_be_asked_is_a_400_that_names_it(server: Any, fields: dict[str, Any], param: str) -> None:
    answer = waterfall(server, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert server.model("tiny").in_flight.__len__() == 0


def test_ranks_and_entropies_are_listed_for_who_asks(server: Any) -> None:
    request = COMPLETION | {"seed": 1, "logprobs": True, "top_logprobs": 3}
    plain = httpx.post(server.url + "/v1/completions", json=request, timeout=60).json()
    told = httpx.post(server.url + "/v1/completions", json=request | {"token_stats": True}, timeout=60).json()
    for before, after in zip(
        plain["choices"][0]["logprobs"]["content"], told["choices"][0]["logprobs"]["content"], strict=True
    ):
        rank, entropy = after.pop("rank"), after.pop("entropy")
        assert after == before
        assert 0 < entropy < math.log(384)
        better = [one["token_id"] for one in before["top_logprobs"][: rank - 1]]
        assert rank > 3 or before["top_logprobs"][len(better)]["token_id"] == before["token_id"]
