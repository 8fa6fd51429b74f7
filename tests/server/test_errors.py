"""Hundreds of malformed requests: each a clear 4xx in OpenAI's shape, and the streams beside them untouched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from myserve.errors import (
    ContextLengthError,
    EngineDeadError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
)
from myserve.server.errors import (
    INTERNAL,
    BodyTooLargeError,
    ModelLoadError,
    error_body,
    error_response,
    status_of,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": USER, "max_tokens": 1},
    COMPLETIONS: {"model": "tiny", "prompt": "hi", "max_tokens": 1},
}

NOT_NUMBERS: tuple[Any, ...] = ("1", True, [], {}, [1.0])
NOT_INTEGERS: tuple[Any, ...] = (*NOT_NUMBERS, 1.5, 1e300)
NOT_BOOLEANS: tuple[Any, ...] = ("true", 1, 0, [], {})
NOT_ID_LISTS: tuple[Any, ...] = ("1", 1, ["1"], [1.5], [None], [[1]], {}, [-1], [10**6])

# field -> values that are wrong on both routes
WRONG: dict[str, tuple[Any, ...]] = {
    "model": (None, 5, "", [], {}, True),
    "temperature": (*NOT_NUMBERS, -0.1, 100.5, -1e308),
    "top_p": (*NOT_NUMBERS, -0.1, 1.1),
    "min_p": (*NOT_NUMBERS, -0.1, 1.1),
    "typical_p": (*NOT_NUMBERS, 0, -0.5, 1.1),
    "top_n_sigma": (*NOT_NUMBERS, 0, -1),
    "top_k": (*NOT_INTEGERS, -2),
    "repetition_penalty": (*NOT_NUMBERS, 0, -1, 1000),
    "frequency_penalty": (*NOT_NUMBERS, -2.1, 2.1),
    "presence_penalty": (*NOT_NUMBERS, -2.1, 2.1, 1e9),
    "seed": (*NOT_INTEGERS, 2**64, -(2**63) - 1, 10**30),
    "n": (*NOT_INTEGERS, 0, -1, 129, 10**9),
    "max_tokens": (*NOT_INTEGERS, 0, -1, 10**9, 513),
    "min_tokens": (*NOT_INTEGERS, -1, 2),
    "stop": (5, {}, True, [1], [None], "", [""], ["a", ""], [str(i) for i in range(17)]),
    "stop_token_ids": NOT_ID_LISTS,
    "allowed_token_ids": (*NOT_ID_LISTS, []),
    "logprob_token_ids": NOT_ID_LISTS,
    "bad_words": ("a", 1, [1], [""], {}),
    "logit_bias": ([], 5, {"a": 1}, {"5": "x"}, {"5": None}, {"-1": 1}, {"1.5": 1}, {"1000000": 1}, {"": 1}),
    "noise": ("white", 1, True, []),
    "logprobs_mode": ("none", 1, []),
    "prompt_logprobs": (*NOT_INTEGERS, -1, 5000),
    "sample_index": (*NOT_INTEGERS, -1, 2**31),
    "num_prior_tokens": (*NOT_INTEGERS, -1, 10**6),
    "stream_options": (5, "usage", [], True, {"include_usage": "yes"}),
    "priority": NOT_INTEGERS,
    "cache_salt": (5, [], True),
    **dict.fromkeys(
        (
            "stream",
            "counts_prior_tokens",
            "token_stats",
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "kept",
            "raw_output",
        ),
        NOT_BOOLEANS,
    ),
    **dict.fromkeys(
        ("return_token_ids", "return_tokens_as_token_ids", "perf_metrics_in_response"), NOT_BOOLEANS
    ),
    **dict.fromkeys(("service_tier", "store", "use_beam_search"), ("something", {"type": "x"}, 5)),
    "response_format": (
        "json",
        True,
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "regex", "regex": "("},
    ),
    "structured_outputs": (
        "x",
        True,
        {"choice": []},
        {"structural_tag": "x"},
        {"regex": "a", "choice": ["a"]},
    ),
    **dict.fromkeys(("guided_json", "json_schema"), (5, ["a"], {"type": "nothing"})),
    **dict.fromkeys(("regex", "guided_regex", "grammar", "guided_grammar"), (5, "", "((", {})),
    **dict.fromkeys(("choice", "guided_choice"), ("x", [], [5])),
}
WRONG_IN_CHAT: dict[str, tuple[Any, ...]] = {
    "messages": (None, [], {}, "hi", 5, [5], [[]], ["hi"], [{}], [None]),
    "logprobs": (1, 0, "true", []),
    "max_completion_tokens": (*NOT_INTEGERS, 0, -5, 10**9, 2),
    "chat_template_kwargs": (5, [], "x", {"tokenize": True}, {"chat_template": "x"}),
    "tools": ([{"type": "function", "function": {"name": "f"}}], "x", {}),
    "tool_choice": ("required", "x", {"type": "function"}, {"type": "function", "function": {"name": "f"}}),
    "parallel_tool_calls": NOT_BOOLEANS,
    "thinking_token_budget": (*NOT_INTEGERS, -1, 5),
    **dict.fromkeys(
        ("functions", "audio", "prediction", "web_search_options", "reasoning_effort"), ("x", ["x"])
    ),
    **dict.fromkeys(("echo", "suffix", "best_of", "chat_template", "continue_final_message"), ("x", 2)),
}
WRONG_MESSAGES: tuple[dict[str, Any], ...] = (
    *({"role": role, "content": "hi"} for role in ("", "User", "function", "bot", None, 5, [])),
    *({"role": role} for role in ("user", "system", "developer", "tool")),
    *(
        {"role": "user", "content": content}
        for content in (None, 5, True, {}, [5], ["hi"], [[]], [{}], [None])
    ),
    *(
        {"role": "user", "content": [part]}
        for part in (
            {"type": "image_url", "image_url": {"url": "data:"}},
            {"type": "input_audio", "input_audio": {}},
            {"type": "file", "file": {}},
            {"type": "text"},
            {"type": "text", "text": 5},
            {"text": "no type"},
        )
    ),
    {"role": "assistant", "content": None, "tool_calls": "x"},
    {"role": "assistant", "content": None, "tool_calls": [5]},
    {"role": "user", "content": "hi", "name": 5},
)
WRONG_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "prompt": (
        *(None, 5, True, {}, [], [[]], [[], [1]], [None], [1.5], ["a", 1], [1, "a"], [[1, "a"]], [[1], "a"]),
        *([-1], [384], [2**40], [[1], [384]], [1] * 513),
    ),
    "logprobs": ("1", -1, 21, 1.5, []),
    "top_logprobs": (*NOT_INTEGERS, -1),
    "best_of": (*NOT_INTEGERS, 0, 2),
    "echo": NOT_BOOLEANS,
    "echo_last": (*NOT_INTEGERS, -1),
    "suffix": ("x", 5),
}


def bad_bodies() -> Iterator[tuple[str, bytes]]:
    """Route and body of every malformed request."""
    for route, minimal in MINIMAL.items():
        own = WRONG_IN_CHAT if route == CHAT else WRONG_IN_COMPLETIONS
        for field, values in (WRONG | own).items():
            for value in values:
                yield route, json.dumps(minimal | {field: value}).encode()
        for field in minimal.keys() - {"max_tokens"}:
            yield (
                route,
                json.dumps({name: value for name, value in minimal.items() if name != field}).encode(),
            )
        whole = json.dumps(minimal).encode()
        yield from ((route, whole[:length]) for length in range(0, len(whole), 7))
        yield from (
            (route, body) for body in (b"null", b"[]", b"7", b'"hi"', b"\xff" * 9, b"[" * 9999, whole + b"}")
        )
        for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
            yield route, whole[:-1] + b', "temperature": ' + number + b"}"
        yield route, whole.replace(b"hi", b"\\ud800")
    for message in WRONG_MESSAGES:
        yield CHAT, json.dumps(MINIMAL[CHAT] | {"messages": [message]}).encode()
    for extra in (
        {"top_logprobs": 1},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": -1},
    ):
        yield CHAT, json.dumps(MINIMAL[CHAT] | extra).encode()


BAD_BODIES = list(bad_bodies())


def check_shape(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object and nothing else."""
    body = response.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def ask_all(url: str) -> list[tuple[str, bytes, httpx.Response]]:
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        headers = {"content-type": "application/json"}
        return [
            (route, body, await http.post(route, content=body, headers=headers)) for route, body in BAD_BODIES
        ]


async def stream_text(url: str, seed: int) -> str:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        chunks = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "talk"}],
            stream=True,
            seed=seed,
            max_tokens=200,
            extra_body={"ignore_eos": True},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


def test_malformed_requests_are_refused_and_disturb_nobody(server: Any) -> None:
    assert len(BAD_BODIES) > 500

    async def both() -> tuple[list[str], list[tuple[str, bytes, httpx.Response]]]:
        streams = [asyncio.create_task(stream_text(server.url, seed)) for seed in range(4)]
        answers = await ask_all(server.url)
        return await asyncio.gather(*streams), answers

    undisturbed = [asyncio.run(stream_text(server.url, seed)) for seed in range(4)]
    disturbed, answers = asyncio.run(both())
    assert disturbed == undisturbed
    for route, body, response in answers:
        shown = (route, body[-200:], response.status_code, response.text[:300])
        assert response.status_code == 400, shown
        error = check_shape(response)
        assert error["type"] == "invalid_request_error", shown
        assert "Traceback" not in error["message"], shown


def test_the_minimal_requests_are_fine(server: Any) -> None:
    """The control: it is the malformed part that was refused."""
    for route, body in MINIMAL.items():
        assert httpx.post(server.url + route, json=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("POST", "/tokenize", 400),
        ("POST", "/detokenize", 400),
    ],
)
def test_other_routes_have_the_same_shape(server: Any, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    check_shape(response)


LONG = "a b " * 2000  # more than the context, in any tokens
TEXT = {"messages": [{"role": "user", "content": LONG}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": USER, "max_tokens": 10_000}, "max_tokens"),
        (CHAT, {"messages": USER, "max_completion_tokens": 10_000}, "max_completion_tokens"),
        (CHAT, TEXT, "messages"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 10_000}, "max_tokens"),
        (COMPLETIONS, {"prompt": [5] * 600}, "prompt"),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 10_000}, "max_output_tokens"),
        ("/v1/responses", {"input": LONG}, "input"),
        ("/v1/messages", TEXT | {"max_tokens": 9}, "messages"),
        (
            "/inference/v1/generate",
            {"token_ids": [5], "sampling_params": {"max_tokens": 10_000}},
            "sampling_params.max_tokens",
        ),
        ("/inference/v1/generate", {"token_ids": [5] * 600, "sampling_params": {}}, "token_ids"),
        (
            "/generate",
            {"input_ids": [5], "sampling_params": {"max_new_tokens": 10_000}},
            "sampling_params.max_new_tokens",
        ),
        ("/generate", {"text": LONG}, "text"),
    ],
)
def test_what_is_too_long_is_named_as_the_route_calls_it(
    server: Any, path: str, body: dict[str, Any], param: str
) -> None:
    answer = httpx.post(server.url + path, json={"model": "tiny", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    said = error if "message" in error else answer.json()
    assert "512 tokens" in said["message"]
    # in SGLang's shape no field is named apart
    assert said["param"] == param
    if param.endswith("tokens"):
        assert f"{param} is 10000" in said["message"]


def test_an_unknown_model_is_a_404_and_says_what_there_is(server: Any) -> None:
    for route, minimal in MINIMAL.items():
        response = httpx.post(server.url + route, json=minimal | {"model": "../../etc"})
        assert response.status_code == 404
        error = check_shape(response)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "tiny" in error["message"]


def test_whose_fault_is_which_number() -> None:
    assert [
        status_of(error)
        for error in (
            RequestError("x"),
            ContextLengthError("x"),
            ModelNotFoundError("x"),
            BodyTooLargeError("x"),
            OverloadedError("x", retry_after=1),
            ModelLoadError("x"),
            EngineDeadError("x"),
            ZeroDivisionError("x"),
        )
    ] == [400, 400, 404, 413, 429, 503, 503, 500]


def test_a_full_queue_says_when_to_come_back() -> None:
    response = error_response(OverloadedError("full", retry_after=2.6))
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


def test_what_went_wrong_inside_stays_inside() -> None:
    assert error_body(KeyError("secret"))["error"]["message"] == INTERNAL
