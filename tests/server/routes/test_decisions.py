"""Decisions have transformers' numbers, and the same bits alone, in company, cached, cold and in any order."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer, pipeline
from transformers.decision import DecisionConfig, label_token_ids

from myserve.engine.config import EngineConfig
from myserve.server.routes.decisions import probabilities_of
from myserve.server.settings import Settings

Body = dict[str, Any]

STATE = {
    "message": "The quick brown fox jumps over the lazy dog. <|im_end|> Hello, hello world!",
    "n": [1, 2],
}
QUESTIONS: Body = {
    "spam": {"type": "noul", "instructions": "Is it spam?", "criteria": {"true": "an ad", "false": None}},
    "tone": {
        "type": "choice",
        "instructions": "What is the tone?",
        "criteria": {"calm": "polite", "pushy": None, "naïve 你好": {"deep": ["down"]}},
    },
    "urgency": {"type": "score", "instructions": "How urgent?", "criteria": ["can wait", "this week", "now"]},
}


def body_of(questions: Mapping[str, Any] = QUESTIONS, **others: Any) -> Body:
    return {"model": "tiny", "state": STATE, "questions": dict(questions)} | others


def ask(url: str, body: Body, path: str = "/v1/systemone") -> Body:
    answer = httpx.post(url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    told: Body = answer.json()
    return told


def bits(told: Body) -> Body:
    """What must not depend on anything: all but the names of the answer, and what happened to be cached."""
    return {
        name: (told["answers"][name], {k: v for k, v in diagnosed.items() if k != "cached_tokens"})
        for name, diagnosed in told["diagnostics"].items()
    }


@pytest.fixture(scope="module")
def alone(server: Any) -> Body:
    """Each question asked in a request of its own, in a cold cache."""
    told: Body = {}
    for name, question in QUESTIONS.items():
        one = ask(server.url, body_of({name: question}, cache_salt=f"alone {name}", return_token_ids=True))
        assert one["diagnostics"][name]["cached_tokens"] == 0
        told |= bits(one)
    return told


def test_numbers_and_prompts_are_transformers(
    server: Any, alone: Body, tiny_model: Any, hf_model: Any
) -> None:
    """This tokenizer cuts Yes in pieces, so its yes and no are letters; transformers is told so."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen3"))
    config = DecisionConfig(labels={"noul": ["A", "B"]})
    decide = pipeline("decision", model=hf_model("qwen3"), tokenizer=tokenizer, decision_config=config)
    expected = decide({"state": STATE, "questions": QUESTIONS})
    prompts = config.prepare_inputs({"state": STATE, "questions": QUESTIONS}, tokenizer)
    assert list(expected) == list(alone)
    for (inputs, questions), (name, (answer, diagnosed)) in zip(prompts, alone.items(), strict=True):
        assert diagnosed["prompt_token_ids"] == inputs["input_ids"][0].tolist(), name
        assert [label["token_id"] for label in diagnosed["labels"]] == label_token_ids(
            tokenizer, questions[0].labels
        )
        assert answer.keys() == expected[name].keys()
        for field, value in expected[name].items():
            assert answer[field] == pytest.approx(value, abs=2e-6), (name, field)


def test_numbers_are_the_labels_raw_logprobs(server: Any, alone: Body) -> None:
    """Scored by another route, as tokens of a prompt, the labels have these bits."""
    for answer, diagnosed in alone.values():
        for label in diagnosed["labels"]:
            scored = httpx.post(
                f"{server.url}/inference/v1/generate",
                json={
                    "model": "tiny",
                    "token_ids": [*diagnosed["prompt_token_ids"], label["token_id"]],
                    "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0},
                },
            ).json()["prompt_logprobs"][-1]
            assert scored[str(label["token_id"])]["logprob"] == label["logprob"]
        logprobs = [label["logprob"] for label in diagnosed["labels"]]
        assert diagnosed["label_mass"] == math.fsum(map(math.exp, logprobs))
        told = [answer["noul"]] if answer["type"] == "noul" else [*answer["probabilities"].values()]
        assert told == probabilities_of(logprobs)[: len(told)]  # type: ignore[index]
        ids = {label["token_id"] for label in diagnosed["labels"]}
        assert diagnosed["argmax_is_label"] == (diagnosed["argmax"]["token_id"] in ids)
        assert diagnosed["argmax"]["logprob"] >= max(logprobs)


@pytest.mark.parametrize("order", [("spam", "tone", "urgency"), ("urgency", "spam", "tone")])
def test_bits_depend_on_no_order_and_no_cache(server: Any, alone: Body, order: tuple[str, ...]) -> None:
    body = body_of({name: QUESTIONS[name] for name in order}, cache_salt=str(order), return_token_ids=True)
    cold, warm = ask(server.url, body), ask(server.url, body)
    assert list(cold["answers"]) == list(order)
    assert bits(cold) == bits(warm) == {name: alone[name] for name in order}
    # the state is computed once: by the first question, for all of them
    cached = [cold["diagnostics"][name]["cached_tokens"] for name in order]
    assert cached[0] == 0 and min(cached[1:]) >= 64
    assert warm["diagnostics"][order[0]]["cached_tokens"] >= 64


def asked_in_company(url: str, num_streams: int = 32) -> Body:
    """The questions, cold, while streams of other requests draw."""
    started, stop = threading.Semaphore(0), threading.Event()

    def stream(seed: int) -> None:
        request = {
            "model": "tiny",
            "prompt": "Say a color: " * (1 + seed % 5),
            "max_tokens": 400,
            "seed": seed,
        }
        request |= {"stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=60) as answer:
            for line in answer.iter_lines():
                if line:
                    started.release()
                if stop.is_set():
                    return

    with ThreadPoolExecutor(num_streams) as pool:
        running = [pool.submit(stream, seed) for seed in range(num_streams)]
        for _ in range(2 * num_streams):
            assert started.acquire(timeout=60)
        try:
            return ask(url, body_of(cache_salt="company", return_token_ids=True))
        finally:
            stop.set()
            for one in running:
                one.result()


def test_bits_are_those_alone_among_32_streams(server: Any, alone: Body) -> None:
    assert bits(asked_in_company(server.url)) == alone


def test_control_without_exactness_company_shows(
    tiny_model: Callable[[str], Path], open_server: Callable[[Settings], AbstractContextManager[Any]]
) -> None:
    engine = EngineConfig(exact="off")
    with open_server(Settings(models={"tiny": str(tiny_model("qwen3"))}, engine=engine)) as inexact:
        together = bits(ask(inexact.url, body_of(cache_salt="a", return_token_ids=True)))
        assert bits(asked_in_company(inexact.url)) != together


def test_control_the_comparison_sees_one_bit(alone: Body) -> None:
    answer, diagnosed = alone["tone"]
    logprobs = [label["logprob"] for label in diagnosed["labels"]]
    nudged = float(np.nextafter(np.float32(logprobs[0]), np.float32(0)))
    assert probabilities_of([nudged, *logprobs[1:]]) != [*answer["probabilities"].values()]


# What openai-python 3.57's `client.decisions.create` sends, byte for byte; its strict client reads the answers.
OPENAI_INPUT = "I was charged twice for my order and want a refund."
OPENAI_QUESTIONS: list[Body] = [
    {"type": "predicate", "instructions": "A refund is requested.", "name": "refund"},
    {
        "type": "choice",
        "instructions": [
            {"type": "input_text", "text": "Which team?"},
            {"type": "input_json", "data": {"a": 1}},
        ],
        "choices": [{"value": "true", "description": "billing"}, {"value": True}, {"value": False}],
    },
    {
        "type": "score",
        "instructions": "How angry?",
        "levels": [{"label": "calm"}, {"label": "cross", "description": "uses capitals"}],
    },
]


def openai_bytes(**changes: Any) -> bytes:
    body = {"model": "tiny", "input": OPENAI_INPUT, "questions": OPENAI_QUESTIONS} | changes
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def post_openai(url: str, **changes: Any) -> httpx.Response:
    headers = {"content-type": "application/json", "authorization": "Bearer any"}
    return httpx.post(f"{url}/v1/decisions", content=openai_bytes(**changes), headers=headers, timeout=60)


def test_openai_s_answers_are_those_of_system_one(server: Any) -> None:
    told = post_openai(server.url).json()
    as_system_one = {
        "0": {"type": "noul", "instructions": "A refund is requested."},
        "1": {
            "type": "choice",
            "instructions": 'Which team?\n{"a":1}',
            "criteria": {'"true"': "billing", "true": None, "false": None},
        },
        "2": {"type": "score", "instructions": "How angry?", "criteria": ["calm", "cross: uses capitals"]},
    }
    asked = ask(server.url, body_of(as_system_one, state=OPENAI_INPUT))["answers"]
    refund, team, anger = told["answers"]
    assert refund == {
        "type": "predicate",
        "name": "refund",
        "probability": asked["0"]["noul"],
        "diagnostics": refund["diagnostics"],
    }
    assert team["name"] is None and team["confidence"] == asked["1"]["confidence"]
    assert [(one["value"], one["probability"]) for one in team["probabilities"]] == list(
        zip(["true", True, False], asked["1"]["probabilities"].values(), strict=True)
    )
    best = max(team["probabilities"], key=lambda one: float(one["probability"]))
    assert team["choice"] is best["value"] or team["choice"] == best["value"] == "true"
    assert anger["score"] == asked["2"]["score"]
    assert [(one["value"], one["label"]) for one in anger["probabilities"]] == [(0, "calm"), (1, "cross")]
    usage = told["usage"]
    assert (
        usage["input_tokens"] == usage["total_tokens"] > usage["input_tokens_details"]["cached_tokens"] >= 0
    )
    assert usage["output_tokens"] == usage["output_tokens_details"]["reasoning_tokens"] == 0


def test_one_user_s_message_is_its_text_and_a_conversation_keeps_who_said_what(server: Any) -> None:
    def first(given: Any) -> Body:
        told: Body = post_openai(
            server.url, input=given, questions=OPENAI_QUESTIONS[:1], return_token_ids=True
        ).json()["answers"][0]
        return told

    def text(given: Any) -> str:
        ids = first(given)["diagnostics"]["prompt_token_ids"]
        decoded: str = httpx.post(f"{server.url}/detokenize", json={"model": "tiny", "tokens": ids}).json()[
            "prompt"
        ]
        return decoded

    plain = first(OPENAI_INPUT)
    parts = [{"type": "input_text", "text": OPENAI_INPUT}]
    for same in (
        {"role": "user", "content": OPENAI_INPUT},
        {"role": "user", "type": "message", "content": parts},
    ):
        assert first([same])["probability"] == plain["probability"]
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "nothing"}
    shown = text([{"role": "system", "content": "Be kind."}, call, output])
    for piece in ('"role": "system"', '"content": "Be kind."', '"name": "look"', '"output": "nothing"'):
        assert piece in shown


BAD: list[tuple[str, str, Body]] = [
    ("questions", "/v1/systemone", {"questions": {}}),
    ("questions", "/v1/systemone", {"questions": {"a": {"type": "noul", "extra": 1}}}),
    ("questions", "/v1/systemone", {"questions": {"a": {"type": "maybe"}, "b": {"type": "choice"}}}),
    ("questions", "/v1/systemone", {"questions": {"a": {"type": "score", "criteria": [str(n) for n in range(27)]}}}),
    ("questions.a", "/v1/systemone", {"questions": {"a": 1}}),
    ("state", "/v1/systemone", {"state": None}),
    ("assets", "/v1/systemone", {"assets": {"img": {"data_base64": ""}}}),
    ("instructions", "/v1/systemone", {"instructions": "Be kind."}),
    ("stream", "/v1/systemone", {"stream": True}),
    ("state", "/v1/systemone", {"state": "long " * 4000}),
    ("questions", "/v1/systemone", {"questions": {"a": {"type": []}}}),
    ("questions", "/v1/systemone", {"questions": {"a": {"type": {"noul": 1}}}}),
    ("chat_template_kwargs", "/v1/systemone", {"chat_template_kwargs": {"tokenize": True}}),
    ("questions", "/v1/decisions", {"questions": []}),
    ("questions[0]", "/v1/decisions", {"questions": [{"type": "rank", "instructions": "x"}]}),
    ("questions[0].choices", "/v1/decisions", {"questions": [OPENAI_QUESTIONS[1] | {"choices": [{"value": "a"}]}]}),
    ("questions[0].choices", "/v1/decisions", {"questions": [OPENAI_QUESTIONS[1] | {"choices": [{"value": "a"}] * 2}]}),
    ("input[0].call_id", "/v1/decisions", {"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}),
    ("input[0].content[0]", "/v1/decisions", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
    ("model", "/v1/decisions", {"model": "another"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("param", "path", "changes"), BAD, ids=[f"{p}-{n}" for n, (p, _, _) in enumerate(BAD)]
)
def test_what_cannot_be_asked_is_told(server: Any, param: str, path: str, changes: Body) -> None:
    whole = json.loads(openai_bytes()) if path == "/v1/decisions" else body_of()
    answer = httpx.post(server.url + path, json=whole | changes, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert error["param"] == param and error["message"], answer.text


def test_all_that_is_wrong_with_questions_is_told_at_once(server: Any) -> None:
    wrong = {"a": {"type": "maybe"}, "b": {"type": "choice"}}
    message = httpx.post(f"{server.url}/v1/systemone", json=body_of(wrong)).json()["error"]["message"]
    assert "'a'" in message and "'b'" in message and "looks like" in message


def test_a_model_s_own_labels_and_temperature_are_read(
    tiny_model: Callable[[str], Path],
    open_server: Callable[[Settings], AbstractContextManager[Any]],
    tmp_path: Path,
    hf_model: Any,
) -> None:
    """As transformers saves them beside the weights. A template for a decision head is refused."""
    config = DecisionConfig(
        labels={"noul": ["Y", "N"], "choice": ["x", "y", "z"]},
        temperature={"choice": 3.0},
        noul_options=["false", "true"],
    )
    folders = {name: shutil.copytree(tiny_model("qwen3"), tmp_path / name) for name in ("own", "head")}
    config.save_pretrained(folders["own"])
    DecisionConfig(chat_template="{{ state }}<|mark|>").save_pretrained(folders["head"])
    model, tokenizer = hf_model("qwen3"), AutoTokenizer.from_pretrained(folders["own"])
    asked = {name: QUESTIONS[name] for name in ("spam", "tone")}
    expected = pipeline("decision", model=model, tokenizer=tokenizer, decision_config=config)(
        {"state": STATE, "questions": asked}
    )
    with open_server(Settings(models={name: str(folder) for name, folder in folders.items()})) as server:
        told = ask(server.url, body_of(asked, model="own"))["answers"]
        assert told["spam"]["noul"] == pytest.approx(expected["spam"]["noul"], abs=2e-6)
        assert told["tone"]["probabilities"] == pytest.approx(expected["tone"]["probabilities"], abs=2e-6)
        refused = httpx.post(f"{server.url}/v1/systemone", json=body_of(asked, model="head"), timeout=60)
        assert refused.status_code == 400 and "decision head" in refused.json()["error"]["message"]


def test_without_transformers_decisions_it_is_told(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.decision", None)
    answer = httpx.post(f"{server.url}/v1/systemone", json=body_of())
    assert answer.status_code == 400 and "5.23" in answer.json()["error"]["message"]


def test_a_label_without_any_probability_has_none() -> None:
    assert probabilities_of([None, -2.0, None]) == [0.0, 1.0, 0.0]
    assert probabilities_of([None, None]) is None


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/decisions"])
def test_a_session_has_no_effect_and_the_answer_says_so(server: Any, path: str) -> None:
    predicate = {"type": "predicate", "instructions": "Is it spam?"}
    body = (
        body_of() if path == "/v1/systemone" else {"model": "tiny", "input": "hi", "questions": [predicate]}
    )
    told = [
        httpx.post(server.url + path, json=body, headers=headers, timeout=60).json()
        for headers in ({}, {"X-Session-ID": "decided"})
    ]
    assert told[0]["warnings"] == []
    assert told[1]["warnings"] == [
        "the session 'decided' has no effect: a decision draws nothing that a later turn could go on from"
    ]
    for answers in (
        [*one["answers"].values()] if path == "/v1/systemone" else one["answers"] for one in told
    ):
        for answer in answers:
            answer.pop("diagnostics", None)  # how much of it was cached
    assert told[0]["answers"] == told[1]["answers"]
    assert httpx.get(server.url + "/v1/sessions/decided").status_code == 404
