"""SGLang's native route, with bodies as slime, AReaL and SGLang's own HTTP tests send them."""

from __future__ import annotations

import base64
import itertools
import json
import math
from typing import Any

import httpx
import numpy as np
import pytest

from myserve.wire.sse import SSEDecoder

IDS = [5, 6, 7, 8, 9, 10]


def send(server: Any, status: int = 200, **body: Any) -> Any:
    answer = httpx.post(server.url + "/generate", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def ours(server: Any, **fields: Any) -> dict[str, Any]:
    body = {
        "model": "tiny",
        "prompt": IDS,
        "seed": 3,
        "max_tokens": 8,
        "logprobs": True,
        "return_token_ids": True,
    }
    answer = httpx.post(server.url + "/v1/completions", json=body | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def pairs(triples: list[list[Any]]) -> list[tuple[float, int]]:
    return [(logprob, token_id) for logprob, token_id, _ in triples]


def entries(choice: dict[str, Any]) -> list[tuple[float, int]]:
    return [(entry["logprob"], entry["token_id"]) for entry in choice["logprobs"]["content"]]


def test_slime_s_rollout_reads_tokens_logprobs_and_the_end(server: Any) -> None:
    """The payload of `slime.rollout.sglang_rollout.generate`."""
    sampling = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 8,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
        "sampling_seed": 3,
    }
    answer = send(server, input_ids=IDS, sampling_params=sampling, return_logprob=True)
    meta, choice = answer["meta_info"], ours(server)
    assert pairs(meta["output_token_logprobs"]) == entries(choice)
    assert answer["output_ids"] == choice["token_ids"]
    assert answer["text"] == choice["text"]
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["weight_version"]) == (6, 8, "0")
    assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 8}]
    assert meta["input_token_logprobs"] == [] and meta["seed"] == 3
    assert isinstance(meta["id"], str) and meta["cached_tokens"] >= 0


def test_text_is_tokenized_as_our_routes_do(server: Any) -> None:
    answer = send(server, text="Hello, hello", sampling_params={"sampling_seed": 3, "max_new_tokens": 8})
    assert answer["text"] == ours(server, prompt="Hello, hello")["text"]
    assert "output_token_logprobs" not in answer["meta_info"]


def test_a_prompt_is_scored_from_where_it_is_asked(server: Any) -> None:
    """As SGLang's own test has it: prompt_tokens == logprob_start_len + len(input_token_logprobs)."""
    asked = {"max_new_tokens": 0, "temperature": 0}
    whole = ours(server, prompt_logprobs=3)["prompt_logprobs"]
    for start in (0, 2, 5, 6):
        meta = send(
            server,
            input_ids=IDS,
            sampling_params=asked,
            return_logprob=True,
            logprob_start_len=start,
            top_logprobs_num=3,
            token_ids_logprob=[11, 12],
        )["meta_info"]
        listed = meta["input_token_logprobs"]
        assert meta["prompt_tokens"] == start + len(listed)
        assert [token_id for _, token_id, _ in listed] == IDS[start:]
        for place, (logprob, token_id, _) in enumerate(listed):
            if place == 0:
                assert logprob is None
                continue
            assert logprob == whole[start + place][str(token_id)]["logprob"]
            top = {i: value for value, i, _ in meta["input_top_logprobs"][place]}
            assert len(top) == 3 and all(whole[start + place][str(i)]["logprob"] == top[i] for i in top)
            assert [i for _, i, _ in meta["input_token_ids_logprobs"][place]] == [11, 12]
        if listed:
            assert meta["input_top_logprobs"][0] is None
        assert meta["output_token_logprobs"] == [] and meta["finish_reason"] == {
            "type": "length",
            "length": 0,
        }


def test_named_ids_of_the_prompt_have_the_logprobs_of_its_distribution(server: Any) -> None:
    everything = list(range(384))
    meta = send(
        server,
        input_ids=IDS,
        sampling_params={"max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
        token_ids_logprob=everything,
    )["meta_info"]
    for row in meta["input_token_ids_logprobs"][1:] + meta["output_token_ids_logprobs"]:
        assert math.fsum(math.exp(value) for value, _, _ in row) == pytest.approx(1, abs=1e-5)
    own = [row[i][0] for row, i in zip(meta["input_token_ids_logprobs"][1:], IDS[1:], strict=True)]
    assert own == [logprob for logprob, _, _ in meta["input_token_logprobs"][1:]]


def test_logprobs_are_of_the_scaled_scores_as_sglang_has_them(server: Any) -> None:
    """log softmax(z / T), whatever was truncated afterwards: what slime's trainer computes again."""
    everything = list(range(384))
    raw = send(
        server,
        input_ids=IDS,
        sampling_params={"max_new_tokens": 1, "sampling_seed": 5},
        return_logprob=True,
        token_ids_logprob=everything,
    )["meta_info"]["output_token_ids_logprobs"][0]
    z = np.array([value for value, _, _ in raw])
    for extra in ({}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}):
        meta = send(
            server,
            input_ids=IDS,
            sampling_params={"max_new_tokens": 1, "sampling_seed": 5, "temperature": 0.6} | extra,
            return_logprob=True,
            top_logprobs_num=3,
        )["meta_info"]
        wanted = z / 0.6 - np.log(np.exp(z / 0.6).sum())
        for logprob, token_id, _ in [*meta["output_token_logprobs"], *meta["output_top_logprobs"][0]]:
            assert logprob == pytest.approx(wanted[token_id], abs=1e-5), extra


def test_a_batch_is_a_list_of_what_each_gives_alone(server: Any) -> None:
    prompts = [IDS, [20, 21], [30]]
    params = [
        {"sampling_seed": 3, "max_new_tokens": 8},
        {"sampling_seed": 4, "max_new_tokens": 3, "temperature": 0.5, "regex": "[a-z]+"},
        {"sampling_seed": 5, "max_new_tokens": 5, "json_schema": '{"type": "integer"}'},
    ]
    asked = {"return_logprob": [True, True, False], "top_logprobs_num": [0, 2, 0], "rid": ["a", "b", "c"]}
    answers = send(server, input_ids=prompts, sampling_params=params, logprob_start_len=[-1, 0, -1], **asked)
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b", "c"]
    for i, answer in enumerate(answers):
        alone = send(
            server,
            input_ids=prompts[i],
            sampling_params=params[i],
            logprob_start_len=[-1, 0, -1][i],
            **{name: values[i] for name, values in asked.items()},
        )
        for both in (answer, alone):
            for name in ("e2e_latency", "cached_tokens"):
                del both["meta_info"][name]
        assert answer == alone
    assert len(answers[0]["output_ids"]) == 8
    shared = send(server, input_ids=prompts, sampling_params={"max_new_tokens": 2}, rid="x")
    assert [answer["meta_info"]["id"] for answer in shared] == ["x_0", "x_1", "x_2"]
    texts = send(server, text=["a", "b"], sampling_params={"max_new_tokens": 2})
    assert len(texts) == 2


def test_several_choices_are_a_list(server: Any) -> None:
    answers = send(
        server, input_ids=IDS, sampling_params={"n": 3, "sampling_seed": 3, "max_new_tokens": 8}, rid="r"
    )
    body = {"model": "tiny", "prompt": IDS, "seed": 3, "max_tokens": 8, "n": 3}
    other = httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()["choices"]
    assert [answer["text"] for answer in answers] == [choice["text"] for choice in other]
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0", "r_1", "r_2"]


def stream(server: Any, **body: Any) -> list[dict[str, Any]]:
    sent = httpx.post(server.url + "/generate", json=body | {"stream": True}, timeout=60)
    assert sent.headers["content-type"].startswith("text/event-stream")
    events = SSEDecoder().feed(sent.content)
    assert events.pop().is_done
    return [event.json() for event in events]


def test_a_stream_repeats_what_came_before(server: Any) -> None:
    """slime's accumulator in its cumulative mode: each event has as many logprobs as it says."""
    asked = {
        "input_ids": IDS,
        "sampling_params": {"sampling_seed": 3, "max_new_tokens": 8},
        "return_logprob": True,
    }
    events, whole = stream(server, **asked), send(server, **asked)
    for before, event in itertools.pairwise(events):
        assert event["text"].startswith(before["text"])
        assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
    for event in events:
        meta = event["meta_info"]
        assert meta["output_token_logprobs_length"] == len(meta["output_token_logprobs"])
        assert len(event["output_ids"]) == meta["completion_tokens"]
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    last = events[-1]
    for both in (last, whole):
        for name in ("e2e_latency", "id", "cached_tokens"):
            del both["meta_info"][name]
    assert last == whole
    batch = stream(server, input_ids=[IDS, [9]], sampling_params={"max_new_tokens": 2})
    assert {event["index"] for event in batch} == {0, 1}


@pytest.mark.parametrize(
    ("sampling", "matched"),
    [
        ({"stop_token_ids": [9], "logit_bias": {"9": 100}}, 9),
        ({"logit_bias": {"2": 100}}, 2),
    ],
)
def test_the_token_that_ended_it_is_listed_and_named(server: Any, sampling: Any, matched: int) -> None:
    answer = send(server, input_ids=IDS, sampling_params=sampling, return_logprob=True)
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": matched}
    assert answer["output_ids"] == [matched] == [i for _, i, _ in meta["output_token_logprobs"]]


def test_stop_strings_forms_and_ebnf(server: Any) -> None:
    red = {"regex": "red stop", "max_new_tokens": 20}
    stopped = send(server, input_ids=IDS, sampling_params=red | {"stop": [" st"]})
    assert (stopped["text"], stopped["meta_info"]["finish_reason"]["matched"]) == ("red", " st")
    kept = send(server, input_ids=IDS, sampling_params=red | {"stop": " st", "no_stop_trim": True})
    assert kept["text"] == "red st"
    forms = [
        {"ebnf": 'root ::= "yes" | "no"'},
        {"json_schema": json.dumps({"enum": ["yes", "no"]})},
        {
            "structural_tag": json.dumps(
                {"type": "structural_tag", "format": {"type": "regex", "pattern": "yes|no"}}
            )
        },
    ]
    for form in forms:
        answer = send(server, input_ids=IDS, sampling_params=form | {"max_new_tokens": 20})
        assert answer["text"].strip('"') in ("yes", "no"), form


def test_text_of_tokens_and_the_prompt_s_ids_on_request(server: Any) -> None:
    answer = send(
        server,
        text="Hello",
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        return_text_in_logprobs=True,
        return_prompt_token_ids=True,
    )
    assert all(isinstance(text, str) for _, _, text in answer["meta_info"]["output_token_logprobs"])
    assert len(answer["prompt_token_ids"]) == answer["meta_info"]["prompt_tokens"]


def int32(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), "<i4")


def test_slime_replays_the_truncation(server: Any) -> None:
    """`rollout_top_p` below 1: ids that were left, with offsets, one more than tokens."""
    sampling = {
        "top_p": 0.7,
        "max_new_tokens": 6,
        "sampling_seed": 1,
        "ignore_eos": True,
        "custom_params": {"return_top_p_token_ids": True},
    }
    answer = send(
        server, input_ids=IDS, sampling_params=sampling, return_logprob=True, return_sampling_mask=True
    )
    meta = answer["meta_info"]
    ids, offsets = int32(meta["top_p_token_ids"]), int32(meta["top_p_token_offsets"])
    assert len(offsets) == 7 and offsets[0] == 0 and offsets[-1] == len(ids)
    for i, token_id in enumerate(answer["output_ids"]):
        support = ids[offsets[i] : offsets[i + 1]].tolist()
        assert token_id in support and support == meta["output_token_sampling_mask"][i]


def test_routed_experts_are_of_every_position_but_the_last(moe_server: Any) -> None:
    sampling = {"max_new_tokens": 4, "sampling_seed": 2, "ignore_eos": True}
    asked = {"model": "moe", "input_ids": IDS, "sampling_params": sampling, "return_routed_experts": True}
    answer = send(moe_server, **asked)
    rows = int32(answer["meta_info"]["routed_experts"]).reshape(len(IDS) + 4 - 1, 2, 2)
    # the same sequence as a prompt goes the same ways
    again = send(
        moe_server,
        **asked | {"input_ids": IDS + answer["output_ids"], "sampling_params": {"max_new_tokens": 1}},
    )
    replayed = int32(again["meta_info"]["routed_experts"]).reshape(-1, 2, 2)
    assert (replayed[: len(rows)] == rows).all()
    part = send(moe_server, **asked | {"routed_experts_start_len": 3})["meta_info"]["routed_experts"]
    assert (int32(part).reshape(-1, 2, 2) == rows[3:]).all()
    assert "input_token_logprobs" not in answer["meta_info"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "either text or input_ids"),
    ({"text": "a", "input_ids": [1]}, "either text or input_ids"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [[]]}, "input_ids"),
    ({"input_ids": ["a"]}, "input_ids"),
    ({"input_ids": [1.5]}, "input_ids"),
    ({"input_ids": [384]}, "token id 384"),
    ({"text": 7}, "text"),
    ({"prompt": "a", "input_ids": [1]}, "send input_ids or text"),
    ({"prompts": ["a"]}, "send input_ids or text"),
    ({"input_ids": [1], "sampling_params": {"temperature": "hot"}}, "temperature"),
    ({"input_ids": [1], "sampling_params": {"top_p": 2}}, "top_p must be in"),
    ({"input_ids": [1], "sampling_params": [{"n": 1}]}, "there is one prompt, not a list"),
    ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "there are 2 prompts"),
    ({"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": 2}]}, "n must be the same"),
    ({"input_ids": [[1], [2]], "return_logprob": [True]}, "there are 2 prompts"),
    ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "an id twice"),
    ({"input_ids": [[1], [2]], "cache_salt": ["a", "b"]}, "cache_salt must be the same"),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": 513}}, "context"),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": -1}}, "max_tokens"),
    ({"input_ids": [1], "sampling_params": {"stop_regex": "a"}}, "stop_regex is not supported"),
    ({"input_ids": [1], "sampling_params": {"custom_params": {"x": 1}}}, "custom_params.x"),
    ({"input_ids": [1], "sampling_params": {"regex": "("}}, "regex"),
    ({"input_ids": [1], "sampling_params": {"regex": "a", "ebnf": 'root ::= "a"'}}, "both say"),
    ({"input_ids": [1], "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len must be in"),
    ({"input_ids": [1], "return_logprob": True, "top_logprobs_num": 21}, "must be in [0, 20]"),
    ({"input_ids": [1], "return_logprob": True, "token_ids_logprob": [500]}, "500"),
    ({"input_ids": [1], "image_data": "http://x"}, "image_data is not supported"),
    ({"input_ids": [1], "return_hidden_states": True}, "return_hidden_states is not supported"),
    ({"input_ids": [1], "return_routed_experts": True}, "dense"),
    ({"input_ids": [1], "custom_logit_processor": "x"}, "custom_logit_processor is not supported"),
]


@pytest.mark.parametrize(("body", "words"), BAD)
def test_bad_input_is_a_400_that_says_so(server: Any, body: dict[str, Any], words: str) -> None:
    error = send(server, 400, **body)["error"]
    assert words in error["message"], error


def test_a_default_never_makes_a_request_too_long(server: Any) -> None:
    answer = send(server, input_ids=[5] * 500, sampling_params={"ignore_eos": True})
    assert answer["meta_info"]["completion_tokens"] == 12


def test_an_answer_says_where_it_stands_in_its_session(server: Any) -> None:
    def told(ids: list[int], **headers: str) -> Any:
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        return httpx.post(server.url + "/generate", json=body, headers=headers, timeout=60).json()

    name = "test_an_answer_says_where_it_stands_in_its_session"
    first = told(IDS, **{"X-Session-ID": name})
    drawn = IDS + first["output_ids"]
    second = told([*drawn, 5], **{"X-Session-ID": name})["meta_info"]["session"]
    assert (second["id"], second["turn"], second["continues"]) == (name, 1, 0)
    assert (second["kept_tokens"], second["new_tokens"], second["drift"]) == (len(drawn), 1, [])
    assert "session" not in told(IDS)["meta_info"]
