"""Whatever the wire declares has an effect: each field alone, on both routes, changes the answer to one request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest

Body = dict[str, Any]

PROMPT = "Hello, hello world! One, two, three, four."
BASE: Body = {
    "model": "tiny",
    "max_tokens": 24,
    "seed": 5,
    "ignore_eos": True,
    "logprobs": True,
    "return_token_ids": True,
}
ROUTES: dict[str, Body] = {
    "/v1/completions": BASE | {"prompt": PROMPT},
    "/v1/chat/completions": BASE | {"messages": [{"role": "user", "content": PROMPT}]},
}


def text_of(answer: Body) -> str:
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def letters_of(answer: Body) -> str:
    """A stop string that the answer has."""
    return next(character for character in text_of(answer) if character.isascii() and character.isalpha())


def fifth_id(answer: Body) -> int:
    return int(answer["choices"][0]["token_ids"][4])


# Field -> its value, or how to find one in the plain answer; and what else both requests say.
CHANGES: dict[str, tuple[Any | Callable[[Body], Any], Body]] = {
    "n": (2, {}),
    "max_tokens": (3, {}),
    "min_tokens": (9, {"ignore_eos": False, "logit_bias": {"2": 100}}),
    "stop": (lambda plain: [letters_of(plain)], {}),
    "stop_token_ids": (lambda plain: [fifth_id(plain)], {}),
    "ignore_eos": (False, {"logit_bias": {"2": 100}}),
    "include_stop_str_in_output": (True, {"stop": list("aeiourstn")}),
    "skip_special_tokens": (False, {"logit_bias": {"1": 100}}),
    "allowed_token_ids": ([60, 61], {}),
    "bad_words": ([chr(code) for code in range(33, 127)], {}),
    **{
        name: (value, {"ignore_eos": False})
        for name, value in {
            "response_format": {"type": "json_object"},
            "structured_outputs": {"regex": "[ab]{9}"},
            "json_schema": {"type": "integer"},
            "regex": "[ab]{9}",
            "choice": ["red", "blue"],
            "grammar": 'root ::= "red" | "blue"',
            "guided_json": {"type": "integer"},
            "guided_regex": "[ab]{9}",
            "guided_choice": ["red", "blue"],
            "guided_grammar": 'root ::= "red" | "blue"',
        }.items()
    },
    "logit_bias": ({"60": 100}, {}),
    "repetition_penalty": (5.0, {"temperature": 0}),
    "frequency_penalty": (2.0, {"temperature": 0}),
    "presence_penalty": (2.0, {"temperature": 0}),
    "temperature": (0.1, {}),
    "top_k": (1, {}),
    "top_p": (0.01, {}),
    "min_p": (0.9, {}),
    "typical_p": (0.05, {}),
    "top_n_sigma": (0.1, {}),
    "seed": (6, {}),
    "noise": ("torch", {}),
    "sample_index": (1, {}),
    "num_prior_tokens": (4, {"frequency_penalty": 2.0}),
    "counts_prior_tokens": (True, {"num_prior_tokens": 4}),
    "top_logprobs": (2, {}),
    "logprobs_mode": ("processed", {"top_logprobs": 5, "top_k": 3}),
    "logprob_token_ids": ([7, 8], {}),
    "kept": (True, {"top_k": 3}),
    "sampling_mask": (True, {"top_k": 3}),
    "token_stats": (True, {}),
    "prompt_logprobs": (1, {}),
    "return_token_ids": (False, {}),
    "return_tokens_as_token_ids": (True, {}),
    "raw_output": (True, {}),
    "perf_metrics_in_response": (True, {}),
    "token_arrays": (True, {}),
    "logprobs": (False, {}),
}
ONLY_COMPLETIONS: dict[str, tuple[Any, Body]] = {"echo": (True, {}), "echo_last": (3, {})}
ONLY_CHAT: dict[str, tuple[Any, Body]] = {
    "max_completion_tokens": (3, {"max_tokens": None}),
    "messages": ([{"role": "user", "content": "Say a color"}], {}),
    "add_generation_prompt": (False, {}),
    "continue_final_message": (True, {}),
}
# What one answer cannot show, and the tests that do.
ELSEWHERE = {
    "model": "test_app",
    "prompt": "test_extensions",
    "best_of": "test_sampling",
    "stream": "test_streaming",
    "stream_options": "test_streaming",
    "stream_interval": "test_cheap_wire",
    "priority": "test_scheduler",
    "request_timeout": "test_limits",
    "cache_salt": "test_extensions",
    "delta_logprobs": "test_extensions",
    "add_special_tokens": "test_extensions",
    "include_reasoning": "test_structured",
    "include_routing_matrix": "test_routing",
    "return_drafters": "test_drafters",
    "chat_template_kwargs": "test_app",
    "chat_template": "test_chat",
    "reasoning_effort": "test_chat",
    "required_prefix_token_ids": "test_required_prefix",
    **dict.fromkeys(
        ("tools", "tool_choice", "parallel_tool_calls", "thinking_token_budget"), "test_structured"
    ),
}
CASES = [
    (path, name)
    for path, own in (("/v1/completions", {}), ("/v1/chat/completions", ONLY_CHAT))
    for name in CHANGES | own
] + [("/v1/completions", name) for name in ("echo", "echo_last")]


def ask(server: Any, path: str, fields: Body) -> Body:
    response = httpx.post(server.url + path, json=ROUTES[path] | fields, timeout=60)
    assert response.status_code == 200, response.text
    answer: Body = response.json()
    for changes_always in ("id", "created", "usage"):
        del answer[changes_always]
    return answer


@pytest.mark.parametrize(("path", "name"), CASES)
def test_a_field_alone_changes_the_answer(server: Any, path: str, name: str) -> None:
    value, company = (CHANGES | ONLY_COMPLETIONS | ONLY_CHAT)[name]
    plain = ask(server, path, company)
    assert ask(server, path, company) == plain, "the control: the same request again"
    assert ask(server, path, company | {name: value(plain) if callable(value) else value}) != plain


@pytest.mark.parametrize(
    ("kind", "own"), [(CompletionRequest, ONLY_COMPLETIONS), (ChatCompletionRequest, ONLY_CHAT)]
)
def test_no_field_is_left_out(kind: Any, own: Body) -> None:
    assert set(kind.model_fields) <= CHANGES.keys() | own.keys() | ELSEWHERE.keys()
