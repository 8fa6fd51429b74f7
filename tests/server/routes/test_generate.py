"""vLLM's token route: the same draws as the other routes, in ids, and its words for what they are."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from myserve.wire.sse import SSEDecoder

PROMPT = [5, 6, 7, 8, 9]


def post(server: Any, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = httpx.post(server.url + path, json=body, timeout=30)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def generate(server: Any, sampling: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "token_ids": PROMPT, "sampling_params": {"max_tokens": 8, "seed": 3} | sampling}
    return post(server, "/inference/v1/generate", body | fields)


def chunks(server: Any, sampling: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "token_ids": PROMPT, "sampling_params": {"max_tokens": 8, "seed": 3} | sampling}
    sent = httpx.post(
        server.url + "/inference/v1/generate", json=body | fields | {"stream": True}, timeout=30
    )
    events = SSEDecoder().feed(sent.content)
    assert events.pop().is_done
    return [event.json() for event in events]


def test_it_draws_what_the_completions_route_draws(server: Any) -> None:
    sampled = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "ignore_eos": True}
    (choice,) = generate(server, sampled | {"logprobs": 3})["choices"]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 3, "return_token_ids": True}
    (other,) = post(server, "/v1/completions", asked | sampled | {"logprobs": True, "top_logprobs": 3})[
        "choices"
    ]
    assert choice["token_ids"] == other["token_ids"]
    assert len(choice["token_ids"]) == 8
    assert choice["finish_reason"] == "length"
    entries = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [
        entry["logprob"] for entry in other["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in entries] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert [len(entry["top_logprobs"]) for entry in entries] == [3] * 8
    assert all(alternative["token"].startswith("token_id:") for alternative in entries[0]["top_logprobs"])
    assert generate(server, sampled)["choices"][0]["logprobs"] is None


def test_the_token_that_ended_it_is_listed_with_its_logprob(server: Any) -> None:
    for ending in ({"stop_token_ids": [9], "logit_bias": {"9": 100}}, {"logit_bias": {"2": 100}}):
        (choice,) = generate(server, ending | {"logprobs": 0})["choices"]
        (entry,) = choice["logprobs"]["content"]
        assert choice["token_ids"] == [int(entry["token"].removeprefix("token_id:"))]
        assert (choice["finish_reason"], entry["top_logprobs"]) == ("stop", [])


def test_the_form_of_the_text_holds_here_too(server: Any) -> None:
    (choice,) = generate(server, {"structured_outputs": {"choice": ["red", "blue"]}, "max_tokens": None})[
        "choices"
    ]
    assert choice["finish_reason"] == "stop"
    text = post(server, "/detokenize", {"tokens": choice["token_ids"]})["prompt"]
    assert text.removesuffix("<|im_end|>") in ("red", "blue")


def test_the_support_of_each_draw_is_its_sampling_mask(server: Any) -> None:
    (choice,) = generate(server, {"kept": True, "top_k": 4, "ignore_eos": True})["choices"]
    assert [len(mask) for mask in choice["sampling_mask"]] == [4] * 8
    assert all(i in mask for i, mask in zip(choice["token_ids"], choice["sampling_mask"], strict=True))
    assert "sampling_mask" not in generate(server, {"top_k": 4})["choices"][0]


def test_a_stream_joined_is_the_whole(server: Any) -> None:
    sampling = {"n": 2, "logprobs": 1}
    whole = generate(server, sampling, request_id="mine", return_token_ids=True)
    *gained, last = chunks(server, sampling, request_id="mine", stream_options={"include_usage": True})
    assert {chunk["request_id"] for chunk in (whole, *gained, last)} == {"mine"}
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert whole["prompt_token_ids"] == PROMPT
    ids, entries, ends = defaultdict[int, list[Any]](list), defaultdict[int, list[Any]](list), {}
    for chunk in gained:
        (choice,) = chunk["choices"]
        ids[choice["index"]] += choice["token_ids"]
        entries[choice["index"]] += choice["logprobs"]["content"]
        ends[choice["index"]] = choice["finish_reason"]
    for choice in whole["choices"]:
        index = choice["index"]
        assert ids[index] == choice["token_ids"]
        assert entries[index] == choice["logprobs"]["content"]
        assert ends[index] == choice["finish_reason"]


def test_a_prompt_is_scored_in_vllms_form(server: Any) -> None:
    scored = generate(server, {"max_tokens": 1, "prompt_logprobs": 1})["prompt_logprobs"]
    assert scored[0] is None
    echoed = post(
        server,
        "/v1/completions",
        {"model": "tiny", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0},
    )["choices"][0]["logprobs"]["token_logprobs"]
    own = [by_id[str(token_id)]["logprob"] for by_id, token_id in zip(scored[1:], PROMPT[1:], strict=True)]
    assert own == echoed[1:]
    assert all(any(entry["rank"] == 1 for entry in by_id.values()) for by_id in scored[1:])
    (first, *rest) = chunks(server, {"prompt_logprobs": 1})
    assert first["prompt_logprobs"] == scored
    assert not any("prompt_logprobs" in chunk for chunk in rest)


def test_without_a_limit_it_goes_on_to_the_end_of_the_context(server: Any) -> None:
    answer = generate(server, {"max_tokens": None, "ignore_eos": True})
    assert answer["usage"]["total_tokens"] == server.model("tiny").engine.max_model_len


def test_without_a_model_the_first_one_answers(server: Any) -> None:
    assert generate(server, {}, model=None)["model"] == "tiny"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"token_ids": PROMPT}, "sampling_params"),
        ({"token_ids": [], "sampling_params": {}}, "token_ids"),
        ({"token_ids": [10**6], "sampling_params": {}}, "prompt"),
        ({"token_ids": PROMPT, "sampling_params": {"top_p": 2.0}}, "top_p"),
        ({"token_ids": PROMPT, "sampling_params": {"logprobs": -1}}, "logprobs"),
        (
            {"token_ids": PROMPT, "sampling_params": {"use_beam_search": True}},
            "sampling_params.use_beam_search",
        ),
        ({"token_ids": PROMPT, "sampling_params": {}, "features": {"mm_hashes": {}}}, "features"),
    ],
)
def test_a_refusal_names_the_field(server: Any, body: dict[str, Any], param: str) -> None:
    assert post(server, "/inference/v1/generate", body, 400)["error"]["param"] == param


def test_what_vllms_clients_send_by_habit_is_taken(server: Any) -> None:
    habits = {
        "detokenize": False,
        "flat_logprobs": True,
        "extra_args": {"a": 1},
        "skip_special_tokens": False,
    }
    assert json.dumps(generate(server, habits)["choices"]) == json.dumps(generate(server, {})["choices"])


def scores_of(text: str) -> Any:
    return np.load(io.BytesIO(base64.b64decode(text)))


def test_a_teacher_scores_named_ids_from_where_it_is_asked(server: Any) -> None:
    """vLLM's `prompt_logprob_token_ids`: row i scores the token behind position start + i, candidates in order."""
    whole = post(
        server,
        "/inference/v1/generate",
        {"model": "tiny", "token_ids": PROMPT, "sampling_params": {"max_tokens": 1, "prompt_logprobs": 20}},
    )["prompt_logprobs"]
    for start in range(5):
        sampling = {"prompt_logprob_token_ids": [9, 6, 7], "prompt_logprob_start": start, "max_tokens": 1}
        answer = post(server, "/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": sampling})
        scores = scores_of(answer["prompt_token_id_logprobs"])
        assert (scores.dtype, scores.shape[0]) == (np.float32, len(PROMPT) - 1 - start)
        assert answer["prompt_logprobs"] is None
        for i, row in enumerate(scores):
            known = {int(name): entry["logprob"] for name, entry in whole[start + i + 1].items()}
            for token_id, value in zip((9, 6, 7), row, strict=True):
                assert known.get(token_id, value) == pytest.approx(value, abs=1e-6)
            own = whole[start + i + 1][str(PROMPT[start + i + 1])]["logprob"]
            if PROMPT[start + i + 1] in (9, 6, 7):
                assert np.float32(own) == row[(9, 6, 7).index(PROMPT[start + i + 1])]


def test_a_teacher_scores_other_candidates_at_each_position(server: Any) -> None:
    rows = [[PROMPT[i + 1], 20 + i] for i in range(2, 4)]
    sampling = {
        "prompt_logprob_token_ids": rows,
        "prompt_logprob_start": 2,
        "max_tokens": 1,
        "prompt_logprobs": 0,
    }
    answer = post(server, "/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": sampling})
    scores, listed = scores_of(answer["prompt_token_id_logprobs"]), answer["prompt_logprobs"]
    assert scores.shape == (2, 2) and listed[:3] == [None] * 3
    assert [np.float32(listed[i + 1][str(PROMPT[i + 1])]["logprob"]) for i in (2, 3)] == scores[:, 0].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {"prompt_logprob_start": 5, "prompt_logprobs": 0},
        {"prompt_logprob_start": -1, "prompt_logprobs": 0},
        {"prompt_logprob_token_ids": [[1], [2]], "prompt_logprobs": 0},
        {"prompt_logprob_token_ids": [[1], [2, 3], [4], [5]], "prompt_logprobs": 0},
        {"prompt_logprob_token_ids": [384]},
        {"prompt_logprob_token_ids": "x"},
    ],
)
def test_what_a_teacher_cannot_score_is_a_400(server: Any, sampling: dict[str, Any]) -> None:
    error = post(server, "/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": sampling}, 400)[
        "error"
    ]
    assert "prompt_logprob" in error["message"]


def test_routed_experts_are_vllm_s_array_beside_our_own(moe_server: Any) -> None:
    sampling = {"max_tokens": 4, "seed": 2, "ignore_eos": True, "include_routing_matrix": True}
    body = {"model": "moe", "token_ids": PROMPT, "sampling_params": sampling}
    (choice,) = post(moe_server, "/inference/v1/generate", body)["choices"]
    routed = scores_of(choice["routed_experts"])
    assert (routed.dtype, routed.shape) == (np.uint8, (len(PROMPT) + 4 - 1, 2, 2))
    own = [base64.b64decode(entry["routing_matrix"]) for entry in choice["logprobs"]["content"]]
    assert routed[len(PROMPT) - 1 :].tobytes() == b"".join(own)
    assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": 4}]


def test_ranks_are_counted_over_the_whole_vocabulary(server: Any, hf_model: Any) -> None:
    """Of every prompt token, one far outside of the top k too: against torch's own logits of transformers' model."""
    prompt = [5, 300, 17, 9, 383, 0, 1, 42]
    body = {"model": "tiny", "token_ids": prompt, "sampling_params": {"max_tokens": 1, "prompt_logprobs": 1}}
    listed = post(server, "/inference/v1/generate", body)["prompt_logprobs"]
    logits = hf_model("qwen3")(torch.tensor([prompt])).logits[0].detach()
    for position, entry in enumerate(listed[1:]):
        row, own = logits[position], prompt[position + 1]
        rank = entry[str(own)]["rank"]
        # the model's own bits may order two that are nearly equal otherwise
        near = int(((row - row[own]).abs() < 1e-4).sum())
        assert abs(rank - (1 + int((row > row[own]).sum()))) < near
        assert sorted(each["rank"] for each in entry.values()) in ([1], [1, rank])


def test_a_sampled_token_has_the_rank_that_it_has_when_it_is_scored(server: Any) -> None:
    """Whatever the draw made of it: drawn by the compiled loop, and by tensors, which truncation needs."""
    for company in ({}, {"typical_p": 0.9, "logit_bias": {"9": 3}, "presence_penalty": 1.0}):
        sampling = {"logprobs": 0, "temperature": 1.4, "ignore_eos": True} | company
        (choice,) = generate(server, sampling)["choices"]
        sequence = PROMPT + choice["token_ids"]
        scored = generate(server, {"max_tokens": 0, "prompt_logprobs": 0}, token_ids=sequence)
        ranks = [
            entry[str(i)]["rank"]
            for i, entry in zip(sequence[1:], scored["prompt_logprobs"][1:], strict=True)
        ]
        assert [entry["rank"] for entry in choice["logprobs"]["content"]] == ranks[len(PROMPT) - 1 :]
        assert max(ranks) > 20
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "logprobs": True}
    (other,) = post(server, "/v1/completions", body)["choices"]
    assert "rank" not in other["logprobs"]["content"][0]
