"""Every field beyond OpenAI's has the effect that the documentation says, streamed or not."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx
import pytest

from myserve.wire.perf_metrics import PerfMetrics
from myserve.wire.sse import SSEDecoder

PROMPT = "Hello, Zß🦄你"


def post(server: Any, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    response = httpx.post(server.url + path, json=fields, timeout=30)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def complete(server: Any, **fields: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 1} | fields
    body = post(server, **asked)
    choice: dict[str, Any] = body["choices"][0]
    return choice


def chat(server: Any, **fields: Any) -> dict[str, Any]:
    user = [{"role": "user", "content": PROMPT}]
    asked = {"model": "tiny", "messages": user, "max_tokens": 8, "seed": 1} | fields
    return post(server, "/v1/chat/completions", **asked)


def stream(server: Any, path: str, **fields: Any) -> list[dict[str, Any]]:
    decoder = SSEDecoder()
    events = []
    with httpx.stream("POST", server.url + path, json=fields | {"stream": True}, timeout=30) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for data in response.iter_bytes():
            events += decoder.feed(data)
    assert events.pop().is_done
    return [event.json() for event in events]


def tokens_of(server: Any, text: str) -> list[int]:
    ids: list[int] = post(server, "/tokenize", prompt=text)["tokens"]
    return ids


# ---- ids


def test_ids_are_the_prompts_and_the_completions(server: Any) -> None:
    choice = complete(server, return_token_ids=True, ignore_eos=True, logprobs=True)
    assert choice["prompt_token_ids"] == tokens_of(server, PROMPT)
    assert choice["token_ids"] == [entry["token_id"] for entry in choice["logprobs"]["content"]]
    assert len(choice["token_ids"]) == 8
    plain = complete(server)
    assert plain["token_ids"] is plain["prompt_token_ids"] is plain["prompt_logprobs"] is None


def test_the_token_that_ended_it_is_among_the_ids_and_not_in_the_text(server: Any) -> None:
    ended = {"logit_bias": {"2": 100}, "logprobs": True}
    choice = complete(server, return_token_ids=True, **ended)
    (entry,) = choice["logprobs"]["content"]
    assert choice["token_ids"] == [entry["token_id"]] == [2]
    assert (choice["text"], entry["bytes"]) == ("", None)
    assert complete(server, **ended)["logprobs"]["content"] == []


def test_raw_output_is_what_fireworks_client_reads(server: Any) -> None:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "seed": 1, "raw_output": True}
    whole = post(server, "/inference/v1/completions", **body, n=1)["choices"][0]
    assert whole["raw_output"]["prompt_token_ids"] == [5, 6, 7]
    chunks = stream(server, "/inference/v1/completions", **body, perf_metrics_in_response=True)
    last = chunks[-1]
    assert last["choices"][0]["raw_output"] == whole["raw_output"]
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert last["perf_metrics"]["prompt-tokens"] == 3
    assert not any("raw_output" in chunk["choices"][0] for chunk in chunks[:-1])


def test_streamed_ids_joined_are_the_whole_ones(server: Any) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 12,
        "seed": 3,
        "return_token_ids": True,
    }
    chunks = [chunk["choices"][0] for chunk in stream(server, "/v1/completions", **fields)]
    whole = post(server, **fields)["choices"][0]
    assert [token_id for chunk in chunks for token_id in chunk["token_ids"]] == whole["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])


def test_tokens_as_ids(server: Any) -> None:
    choice = complete(server, logprobs=2, return_tokens_as_token_ids=True, return_token_ids=True)
    names = [f"token_id:{i}" for i in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names


# ---- echo and prompt logprobs


def test_an_echo_has_a_row_for_every_token(server: Any) -> None:
    choice = complete(server, echo=True, logprobs=1, return_token_ids=True, ignore_eos=True)
    prompt, completion = choice["prompt_token_ids"], choice["token_ids"]
    logprobs = choice["logprobs"]
    assert {len(rows) for rows in logprobs.values()} == {len(prompt) + len(completion)}
    assert choice["text"].startswith(PROMPT)
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])


def test_fireworks_client_gets_a_number_in_every_row_of_an_echo(server: Any) -> None:
    """It drops all logprobs if one is missing, and then the first, which nothing stands before."""
    ids = tokens_of(server, PROMPT)
    asked = {"prompt": ids, "echo": True, "logprobs": True, "max_tokens": 3, "ignore_eos": True}
    raw = complete(server, **asked, raw_output=True)
    plain = complete(server, **asked)["logprobs"]["content"]
    rows = raw["logprobs"]["content"]
    assert rows[0]["logprob"] == 0.0
    assert plain[0]["logprob"] is None
    assert rows[1:] == plain[1:]
    assert len(rows) == len(raw["raw_output"]["completion_token_ids"]) == len(ids) + 3


def test_a_streamed_echo_joined_is_the_whole_one(server: Any) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["ab", PROMPT],
        "seed": 1,
        "n": 2,
        "echo": True,
        "logprobs": 1,
    }
    whole = post(server, **fields)
    rows: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    texts: dict[int, str] = defaultdict(str)
    for chunk in stream(server, "/v1/completions", **fields):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        for name, values in choice["logprobs"].items():
            rows[choice["index"]][name] += values
    for choice in whole["choices"]:
        assert texts[choice["index"]] == choice["text"]
        assert dict(rows[choice["index"]]) == choice["logprobs"]


def test_what_decode_gave_scoring_gives_again(server: Any) -> None:
    """Logprobs of a completion = those of the same ids as a prompt, bit for bit."""
    choice = complete(server, logprobs=True, return_token_ids=True, ignore_eos=True)
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    scored = complete(server, prompt=ids, echo=True, max_tokens=0, logprobs=True)
    sampled = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert [entry["logprob"] for entry in scored["logprobs"]["content"]][-8:] == sampled


def test_scoring_alone_samples_nothing(server: Any) -> None:
    body = post(server, model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 0


def test_echo_last_is_the_prompts_tail(server: Any) -> None:
    ids = tokens_of(server, PROMPT)
    choice = complete(server, prompt=ids, echo_last=2, logprobs=True, raw_output=True, ignore_eos=True)
    rows = [entry["token_id"] for entry in choice["logprobs"]["content"]]
    assert rows[:2] == ids[-2:]
    assert len(rows) == 2 + 8
    assert choice["raw_output"]["completion_token_ids"] == rows


def test_prompt_logprobs_in_vllms_form(server: Any) -> None:
    ids = tokens_of(server, PROMPT)
    rows = complete(server, prompt=ids, prompt_logprobs=2)["prompt_logprobs"]
    assert rows[0] is None
    for token_id, row in zip(ids[1:], rows[1:], strict=True):
        assert str(token_id) in row
        assert {entry["rank"] for entry in row.values()} >= {1, 2}
    echoed = complete(server, prompt=ids, echo=True, logprobs=True)["logprobs"]["content"]
    assert [row[str(i)]["logprob"] for i, row in zip(ids[1:], rows[1:], strict=True)] == [
        entry["logprob"] for entry in echoed[1 : len(ids)]
    ]


# ---- numbers for training


def test_behaviour_and_raw_logprobs_differ_where_the_draw_was_shaped(server: Any) -> None:
    plain = complete(server, logprobs=True, ignore_eos=True)["logprobs"]["content"]
    assert [e["sampling_logprob"] for e in plain] == pytest.approx([e["logprob"] for e in plain], abs=1e-5)
    shaped = complete(server, logprobs=True, ignore_eos=True, top_k=2)["logprobs"]["content"]
    assert all(entry["sampling_logprob"] > entry["logprob"] for entry in shaped)


def test_processed_logprobs_are_those_of_the_draw(server: Any) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "top_k": 2, "ignore_eos": True}
    for entry in complete(server, logprobs_mode="processed", **fields)["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 2  # the third is out of the support
    assert len(complete(server, **fields)["logprobs"]["content"][0]["top_logprobs"]) == 3


def test_the_kept_set_and_the_logprobs_of_given_ids(server: Any) -> None:
    entry = complete(server, logprobs=True, top_k=3, kept=True, logprob_token_ids=[5, 9])["logprobs"][
        "content"
    ][0]
    assert len(entry["kept"]["token_ids"]) == 3
    assert 0 < entry["kept"]["mass"] < 1
    assert [given["token_id"] for given in entry["token_id_logprobs"]] == [5, 9]


def test_a_completion_goes_on_where_it_was_cut(server: Any) -> None:
    """`num_prior_tokens`: the prompt's tail was sampled before, so draws and penalties continue."""
    fields: dict[str, Any] = {"frequency_penalty": 1.0, "return_token_ids": True, "ignore_eos": True, "n": 2}
    body = post(server, model="tiny", prompt=PROMPT, max_tokens=10, seed=4, **fields)
    for index, choice in enumerate(body["choices"]):
        ids = choice["prompt_token_ids"] + choice["token_ids"][:4]
        resumed = complete(
            server,
            **fields | {"prompt": ids, "max_tokens": 6, "seed": 4, "sample_index": index, "n": 1},
            num_prior_tokens=4,
        )
        assert resumed["token_ids"] == choice["token_ids"][4:]


def test_an_unseeded_answer_names_its_seed_and_version(server: Any) -> None:
    drawn = complete(server, seed=None)
    assert complete(server, seed=drawn["seed"])["text"] == drawn["text"]
    assert drawn["weight_version"] == 0
    assert drawn["stop_reason"] is None


# ---- the original specification's shape, metrics, headers


def test_the_original_specifications_shape_stands_beside_openais(server: Any) -> None:
    body = chat(server, logprobs=True, top_logprobs=2)
    assert body["logprobs"] == body["choices"][0]["logprobs"]


def test_a_streams_deltas_have_logprobs_for_those_who_ask(server: Any) -> None:
    """openai-python's stream helper takes lists inside a delta for its own, and dies."""
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 4,
        "logprobs": True,
    }
    for chunk in stream(server, "/v1/chat/completions", **asked, delta_logprobs=True):
        (choice,) = chunk["choices"]
        assert choice["delta"]["logprobs"] == choice["logprobs"]
    for chunk in stream(server, "/v1/chat/completions", **asked):
        assert chunk["choices"][0]["logprobs"] is not None
        assert "logprobs" not in chunk["choices"][0]["delta"]


def test_a_chats_prompt_scores_stand_where_vllm_has_them(server: Any) -> None:
    body = chat(server, prompt_logprobs=1, n=2)
    assert body["prompt_logprobs"] == body["choices"][0]["prompt_logprobs"]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}
    first, *others = stream(server, "/v1/chat/completions", **asked, prompt_logprobs=1)
    assert first["prompt_logprobs"] == body["prompt_logprobs"]
    assert not any("prompt_logprobs" in chunk for chunk in others)


def test_usage_may_come_with_every_chunk(server: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chats = {"messages": [{"role": "user", "content": PROMPT}]}
    for route, prompt in (("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", chats)):
        asked = {
            "model": "tiny",
            "max_tokens": 5,
            "ignore_eos": True,
            "n": 2,
            "return_token_ids": True,
        } | prompt
        chunks = list(stream(server, route, **asked, stream_options=options))
        so_far = 0
        for chunk in chunks:
            so_far += sum(len(choice["token_ids"]) for choice in chunk["choices"])
            # a chunk that only opens a choice comes with the first tokens: of a draft that is right, there are several
            opens = not any(choice["token_ids"] for choice in chunk["choices"])
            told = chunk["usage"]["completion_tokens"]
            assert told > so_far if opens and chunk["choices"] else told == so_far
        assert so_far == chunks[-1]["usage"]["completion_tokens"] == 10


def test_a_text_that_has_its_bos_may_be_sent_as_it_is(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = server.model("tiny").codec
    encode = codec.encode

    def with_bos(_: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + encode(text, add_special_tokens=False)

    monkeypatch.setattr(type(codec), "encode", with_bos)
    ids = complete(server, return_token_ids=True)["prompt_token_ids"]
    assert complete(server, return_token_ids=True, add_special_tokens=False)["prompt_token_ids"] == ids[1:]


def test_every_prompt_token_has_its_rank(server: Any) -> None:
    scored = post(server, model="tiny", prompt=PROMPT, max_tokens=1, prompt_logprobs=384)["choices"][0]
    few = post(server, model="tiny", prompt=PROMPT, max_tokens=1, prompt_logprobs=0)["choices"][0]
    assert len(scored["prompt_logprobs"]) > 5
    for all_ids, own in zip(scored["prompt_logprobs"][1:], few["prompt_logprobs"][1:], strict=True):
        ((token_id, told),) = own.items()
        order = sorted(all_ids, key=lambda i: (-all_ids[i]["logprob"], int(i)))
        assert told["rank"] == order.index(token_id) + 1
        assert [all_ids[i]["rank"] for i in order] == list(range(1, 385))


def test_the_older_form_has_the_token_itself_and_as_many_others_as_asked(server: Any) -> None:
    for k in (0, 1, 5):
        lists = complete(server, logprobs=k, echo=True, ignore_eos=True)["logprobs"]
        for text, value, shown in list(
            zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True)
        )[1:]:
            assert shown[text] == value
            assert len(shown) in {k, k + 1} - {0}


def test_of_the_processed_distribution_the_token_itself_has_its_number_there(server: Any) -> None:
    asked = {"logprobs_mode": "processed", "temperature": 2.0, "ignore_eos": True, "logprobs": 1}
    chosen = complete(server, **asked)["logprobs"]
    entries = complete(server, **asked | {"logprobs": True, "top_logprobs": 1})["logprobs"]["content"]
    for text, shown, entry in zip(chosen["tokens"], chosen["top_logprobs"], entries, strict=True):
        assert shown[text] == entry["sampling_logprob"]


def test_metrics_in_body_and_headers(server: Any) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 4,
        "perf_metrics_in_response": True,
    }
    response = httpx.post(server.url + "/v1/completions", json=fields)
    in_body = PerfMetrics.from_mapping(response.json()["perf_metrics"])
    assert in_body == PerfMetrics.from_mapping(response.headers)
    assert in_body.prompt_tokens == len(tokens_of(server, PROMPT))
    assert in_body.server_processing_time is not None
    assert in_body.server_time_to_first_token is not None
    assert 0 < in_body.server_time_to_first_token <= in_body.server_processing_time
    assert in_body.kv_cache_usage is not None and 0 <= in_body.kv_cache_usage < 1
    plain = httpx.post(server.url + "/v1/completions", json=fields | {"perf_metrics_in_response": False})
    assert "perf_metrics" not in plain.json()
    assert not any(name.startswith("fireworks-") for name in plain.headers)


def test_a_prompt_seen_before_is_cached_unless_salted(server: Any) -> None:
    long = "a long prompt that fills several blocks of the cache, " * 3

    def cached(**fields: Any) -> int:
        body = post(server, model="tiny", prompt=long, max_tokens=1, **fields)
        count: int = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    cached()
    assert cached() > 0
    assert cached(cache_salt="mine") == 0


@pytest.mark.parametrize("sent", ["abc-123", "x" * 128])
def test_the_request_id_comes_back(server: Any, sent: str) -> None:
    assert httpx.get(server.url + "/health", headers={"x-request-id": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 129])
def test_a_request_without_a_usable_id_gets_one(server: Any, sent: str) -> None:
    given = httpx.get(server.url + "/health", headers={"x-request-id": sent}).headers["x-request-id"]
    assert len(given) == 32


# ---- other routes


def test_tokenize_and_back(server: Any) -> None:
    body = post(server, "/tokenize", prompt=PROMPT, return_token_strs=True)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    assert post(server, "/detokenize", tokens=body["tokens"]) == {"prompt": PROMPT}


def test_tokenized_messages_are_the_chat_routes_prompt(server: Any) -> None:
    user = [{"role": "user", "content": "<|im_end|> hi"}]
    ids = post(server, "/tokenize", messages=user)["tokens"]
    body = chat(server, messages=user, return_token_ids=True)
    assert ids == body["prompt_token_ids"] == body["choices"][0]["prompt_token_ids"]
    assert ids.count(2) == 1  # the template's own <|im_end|>


def test_health(server: Any) -> None:
    for path in ("/health", "/healthz"):
        assert httpx.get(server.url + path).json() == {"status": "ok"}
    ready = httpx.get(server.url + "/ready")
    assert (ready.status_code, set(ready.json()["models"].values())) == (200, {"ready"})
    assert "version" in httpx.get(server.url + "/version").json()


def test_the_inspector_asks_nobody_else(server: Any) -> None:
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_the_schema_documents_the_bodies(server: Any) -> None:
    schema = httpx.get(server.url + "/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    name = body["$ref"].removeprefix("#/components/schemas/")
    assert "min_p" in schema["components"]["schemas"][name]["properties"]
    references = {part.split('"')[0] for part in json.dumps(schema).split("#/components/schemas/")[1:]}
    assert references <= set(schema["components"]["schemas"])
