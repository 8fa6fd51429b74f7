"""`include_routing_matrix`: the experts of every token, where Fireworks' client looks for them, streamed or not."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from myserve.wire.sse import SSEDecoder

PROMPT = list(range(40, 75))
CHAT = {"messages": [{"role": "user", "content": "Hello, world"}]}
ASKED = {"model": "moe", "prompt": PROMPT, "max_tokens": 9, "seed": 1, "ignore_eos": True}
ROUTED = ASKED | {"include_routing_matrix": True}


def post(server: Any, fields: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    response = httpx.post(server.url + path, json=fields, timeout=60)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def streamed(server: Any, fields: dict[str, Any], path: str = "/v1/completions") -> list[dict[str, Any]]:
    """Of each chunk its only choice."""
    decoder, events = SSEDecoder(), []
    with httpx.stream("POST", server.url + path, json=fields | {"stream": True}, timeout=60) as response:
        for data in response.iter_bytes():
            events += decoder.feed(data)
    assert events.pop().is_done
    return [choice for event in events for choice in event.json()["choices"]]


def entries_of(*choices: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for choice in choices for entry in choice["logprobs"]["content"]]


def matrices_of(*choices: dict[str, Any]) -> list[str | None]:
    return [entry.get("routing_matrix") for entry in entries_of(*choices)]


def test_every_token_has_the_experts_that_the_models_own_routers_choose(
    moe_server: Any, tiny_model: Any
) -> None:
    choice = post(moe_server, ROUTED | {"logprobs": True, "return_token_ids": True})["choices"][0]
    assert choice["routing_matrix_shape"] == [2, 2]
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3_moe")).eval()
    with torch.inference_mode():
        out = model(torch.tensor([PROMPT + choice["token_ids"]]), output_router_logits=True)
    own = torch.stack([layer.topk(2).indices for layer in out.router_logits], 1)[len(PROMPT) - 1 : -1]
    assert [list(base64.b64decode(matrix or "")) for matrix in matrices_of(choice)] == own.flatten(1).tolist()
    assert not any("routing_matrix_dtype" in entry for entry in entries_of(choice))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/completions", {"prompt": PROMPT}), ("/inference/v1/chat/completions", CHAT)],
)
def test_a_stream_joined_is_the_whole_and_it_needs_no_logprobs(
    moe_server: Any, path: str, fields: dict[str, Any], n: int
) -> None:
    plain = {"model": "moe", "max_tokens": 9, "seed": 1, "ignore_eos": True, "n": n} | fields
    routed = plain | {"include_routing_matrix": True}
    whole = post(moe_server, routed, path)["choices"]
    chunks = streamed(moe_server, routed, path)
    for index, choice in enumerate(whole):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        assert matrices_of(*mine) == matrices_of(choice)
        assert len(entries_of(choice)) == 9 and None not in matrices_of(choice)
        assert mine[0]["routing_matrix_shape"] == [2, 2]
        assert not any("routing_matrix_shape" in chunk for chunk in mine[1:])
    assert (
        post(moe_server, routed | {"logprobs": True}, path)["choices"][0]["logprobs"] == whole[0]["logprobs"]
    )
    for choice in (*post(moe_server, plain, path)["choices"], *streamed(moe_server, plain, path)):
        assert choice["logprobs"] is None
    logged = post(moe_server, plain | {"logprobs": True}, path)["choices"][0]
    assert set(matrices_of(logged)) == {None}


def test_an_echo_has_the_prompts_rows_too(moe_server: Any) -> None:
    bare = post(moe_server, ROUTED)["choices"][0]
    echoed = post(moe_server, ROUTED | {"echo": True})["choices"][0]
    first, *rest = matrices_of(echoed)
    assert first is None, "nothing is run before the first token"
    assert len(rest) == len(PROMPT) + 9 - 1 and None not in rest
    assert rest[-9:] == matrices_of(bare)
    # the same prompt as a completion's: each of its tokens has the row that it had when it was echoed
    longer = ROUTED | {"prompt": PROMPT[:20], "allowed_token_ids": None, "max_tokens": 1}
    assert matrices_of(post(moe_server, longer)["choices"][0]) == [rest[19]]
    assert matrices_of(*streamed(moe_server, ROUTED | {"echo": True})) == [None, *rest]
    last = post(moe_server, ROUTED | {"echo_last": 3})["choices"][0]
    assert matrices_of(last) == rest[-9 - 3 :]
    scored = post(moe_server, ROUTED | {"echo": True, "max_tokens": 0})["choices"][0]
    assert matrices_of(scored) == [None, *rest[:-9]]


def test_a_chat_gets_its_prompts_rows_with_prompt_logprobs(moe_server: Any) -> None:
    asked = CHAT | {"model": "moe", "max_tokens": 2, "include_routing_matrix": True, "prompt_logprobs": 0}
    choice = post(moe_server, asked | {"return_token_ids": True}, "/v1/chat/completions")["choices"][0]
    first, *rest = choice["prompt_routing_matrices"]
    assert first is None and None not in rest
    assert len(rest) == len(choice["prompt_token_ids"]) - 1
    assert streamed(moe_server, asked, "/v1/chat/completions")[0]["prompt_routing_matrices"] == [None, *rest]


def test_the_token_that_ended_it_has_its_row(moe_server: Any) -> None:
    ended = ROUTED | {"ignore_eos": False, "logit_bias": {"2": 100}}
    for choices in (post(moe_server, ended)["choices"], streamed(moe_server, ended)):
        (entry,) = entries_of(*choices)
        assert entry["token_id"] == 2 and entry["routing_matrix"]


def test_the_four_lists_have_a_fifth(moe_server: Any) -> None:
    lists = post(moe_server, ROUTED | {"logprobs": 1})["choices"][0]["logprobs"]
    assert lists["routing_matrix"] == matrices_of(post(moe_server, ROUTED)["choices"][0])
    assert "routing_matrix" not in post(moe_server, ASKED | {"logprobs": 1})["choices"][0]["logprobs"]


def test_ids_over_255_are_uint16_and_say_so(moe_server: Any) -> None:
    choice = post(moe_server, ROUTED | {"model": "wide", "echo": True})["choices"][0]
    assert choice["routing_matrix_shape"] == [2, 4]
    routed = entries_of(choice)[1:]
    assert {entry["routing_matrix_dtype"] for entry in routed} == {"uint16"}
    raw = b"".join(base64.b64decode(entry["routing_matrix"]) for entry in routed)
    ids = torch.frombuffer(bytearray(raw), dtype=torch.uint16).int()
    assert len(ids) == len(routed) * 2 * 4 and 256 <= int(ids.max()) < 300


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_dense_model_refuses_by_name(moe_server: Any, path: str) -> None:
    asked = {"model": "dense", "prompt": PROMPT, **CHAT, "include_routing_matrix": True}
    response = httpx.post(moe_server.url + path, json=asked, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "include_routing_matrix")
    assert "dense" in error["message"]
    assert (
        httpx.post(moe_server.url + path, json=asked | {"include_routing_matrix": False}).status_code == 200
    )


def test_other_forms_of_it_are_refused_by_name(moe_server: Any) -> None:
    asked = json.dumps(ASKED | {"routing_matrix_format": "parquet_v1"})
    response = httpx.post(moe_server.url + "/v1/completions", content=asked, timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "routing_matrix_format")


def test_the_token_route_has_it_too(moe_server: Any) -> None:
    sampling = {"max_tokens": 9, "seed": 1, "ignore_eos": True, "include_routing_matrix": True}
    asked = {"model": "moe", "token_ids": PROMPT, "sampling_params": sampling}
    choice = post(moe_server, asked, "/inference/v1/generate")["choices"][0]
    assert matrices_of(choice) == matrices_of(post(moe_server, ROUTED)["choices"][0])
    assert matrices_of(*streamed(moe_server, asked, "/inference/v1/generate")) == matrices_of(choice)


def test_token_arrays_hold_the_same_routing_in_one_string(moe_server: Any) -> None:
    body = ROUTED | {"echo": True}
    listed = [matrix or "" for matrix in matrices_of(*post(moe_server, body | {"logprobs": True})["choices"])]
    packed = post(moe_server, body | {"token_arrays": True})["choices"][0]
    assert packed["logprobs"] is None
    arrays = packed["token_arrays"]
    rows = base64.b64decode(arrays["routing_matrix"])
    width = len(rows) // arrays["count"]
    first, *others = [rows[i * width : (i + 1) * width] for i in range(arrays["count"])]
    assert others == [base64.b64decode(matrix) for matrix in listed[1:]]
    assert (first, listed[0]) == (bytes(width), "")
