"""Fewer chunks and packed numbers say exactly what many chunks and JSON entries say."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import httpx
import pytest

from myserve.wire.sse import SSEDecoder
from myserve.wire.token_arrays import decode_floats, decode_ints

PROMPT = [5, 6, 7, 8, 9, 40, 41, 42]
COMPLETION = {"model": "tiny", "prompt": PROMPT, "max_tokens": 21, "seed": 3, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 21, "seed": 3}
GENERATE = {
    "model": "tiny",
    "token_ids": PROMPT,
    "sampling_params": {"max_tokens": 21, "seed": 3, "logprobs": 2, "n": 2, "ignore_eos": True},
}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION | {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    "/v1/chat/completions": CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    "/inference/v1/generate": GENERATE,
}
each_route = pytest.mark.parametrize("path", ROUTES)


def post(server: Any, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(server.url + path, json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response


def stream(server: Any, path: str, body: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The chunks of each choice."""
    events = SSEDecoder().feed(post(server, path, body | {"stream": True}).content)
    assert events.pop().is_done
    chunks = defaultdict(list)
    for event in events:
        for choice in event.json()["choices"]:
            chunks[choice["index"]].append(choice)
    return chunks


def text_of(choice: dict[str, Any]) -> str:
    return str(choice.get("delta", choice).get("content" if "delta" in choice else "text") or "")


@each_route
def test_an_interval_merges_chunks_and_changes_nothing_else(server: Any, path: str) -> None:
    every, merged = (stream(server, path, ROUTES[path] | more) for more in ({}, {"stream_interval": 5}))
    for index, single in every.items():
        few = merged[index]
        assert "".join(map(text_of, few)) == "".join(map(text_of, single))
        for read in (lambda c: c["token_ids"], lambda c: c["logprobs"]["content"]):
            assert [x for c in few for x in read(c)] == [x for c in single for x in read(c)]
        assert few[-1]["finish_reason"] == single[-1]["finish_reason"]
        # a chat's first chunk opens the choice, and may come before its first token
        sizes = [len(choice["token_ids"]) for choice in few if choice["token_ids"] or choice is few[-1]]
        assert sizes[0] == next(len(c["token_ids"]) for c in single if c["token_ids"]), (
            "the first token never waits"
        )
        assert all(size >= 5 for size in sizes[1:-1])
        assert len(few) < len(single) / 2


@each_route
@pytest.mark.parametrize("streamed", [False, True])
def test_arrays_hold_the_entries_bit_for_bit(server: Any, path: str, streamed: bool) -> None:
    def choices(more: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
        if streamed:
            return stream(server, path, ROUTES[path] | more)
        return {c["index"]: [c] for c in post(server, path, ROUTES[path] | more).json()["choices"]}

    listed, packed = choices({}), choices({"token_arrays": True})
    assert listed.keys() == packed.keys() == {0, 1}
    for index, chunks in packed.items():
        assert all(chunk["logprobs"] is None for chunk in chunks)
        arrays = [chunk["token_arrays"] for chunk in chunks]
        entries = [entry for chunk in listed[index] for entry in chunk["logprobs"]["content"]]
        assert sum(one["count"] for one in arrays) == len(entries) > 5
        for name, decode in (("token_id", decode_ints), ("logprob", decode_floats)):
            assert [x for one in arrays for x in decode(one[name])] == [entry[name] for entry in entries]
        drawn = [x for one in arrays for x in decode_floats(one["sampling_logprob"])]
        assert drawn == [pytest.approx(entry["sampling_logprob"], rel=1e-6) for entry in entries]
        tops = [(a["token_id"], a["logprob"]) for entry in entries for a in entry["top_logprobs"]]
        ids = [x for one in arrays for x in decode_ints(one["top_token_id"])]
        logprobs = [x for one in arrays for x in decode_floats(one["top_logprob"])]
        assert list(zip(ids, logprobs, strict=True)) == tops


def test_an_echoed_prompt_stands_in_the_arrays(server: Any) -> None:
    body = COMPLETION | {"echo": True, "max_tokens": 3}
    (listed,) = post(server, "/v1/completions", body | {"logprobs": True}).json()["choices"]
    (packed,) = post(server, "/v1/completions", body | {"token_arrays": True}).json()["choices"]
    arrays, entries = packed["token_arrays"], listed["logprobs"]["content"]
    assert decode_ints(arrays["token_id"]) == tuple(entry["token_id"] for entry in entries)
    assert arrays["count"] == len(PROMPT) + 3
    first, *rest = decode_floats(arrays["logprob"])
    assert math.isnan(first)
    assert rest == [entry["logprob"] for entry in entries[1:]]
    assert [math.isnan(x) for x in decode_floats(arrays["sampling_logprob"])] == [True] * 8 + [False] * 3
    assert "top_logprob" not in arrays
    assert packed["text"] == listed["text"]


@pytest.mark.parametrize("interval", [0, -1, 1.5, "2"])
def test_an_interval_is_a_count(server: Any, interval: Any) -> None:
    response = httpx.post(server.url + "/v1/completions", json=COMPLETION | {"stream_interval": interval})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_interval"
