"""`return_drafters` says of each token what had drafted it; metrics count drafts; drafts change no answer."""

from __future__ import annotations

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from myserve.wire.sse import SSEDecoder

# greedy, a random model goes round in a loop, which its own text drafts
LOOP = {
    "model": "tiny",
    "prompt": list(range(40, 60)),
    "max_tokens": 90,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}
ASKED = LOOP | {"return_drafters": True, "perf_metrics_in_response": True}


def test_drafted_tokens_name_their_drafter_streamed_or_not(server: Any) -> None:
    whole = httpx.post(server.url + "/v1/completions", json=ASKED, timeout=60).json()
    (choice,) = whole["choices"]
    drafters, metrics = choice["drafters"], whole["perf_metrics"]
    assert len(drafters) == len(choice["token_ids"]) == whole["usage"]["completion_tokens"] == 90
    assert drafters[0] is None and set(drafters) == {None, "ngram"}
    accepted = metrics["speculation-accepted-tokens"]
    assert 90 - drafters.count(None) == accepted <= metrics["speculation-generated-tokens"]

    decoder, events = SSEDecoder(), []
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=ASKED | {"stream": True}, timeout=60
    ) as response:
        for data in response.iter_bytes():
            events += decoder.feed(data)
    assert events.pop().is_done
    pieces = [piece for event in events for piece in event.json()["choices"]]
    assert [i for piece in pieces for i in piece.get("token_ids", ())] == choice["token_ids"]
    assert len([d for piece in pieces for d in piece.get("drafters", ())]) == 90


def test_an_answer_has_no_drafters_unless_it_is_asked_for_them(server: Any) -> None:
    (choice,) = httpx.post(server.url + "/v1/completions", json=LOOP, timeout=60).json()["choices"]
    assert "drafters" not in choice


def test_metrics_count_drafts_under_vllms_names(server: Any) -> None:
    def counted() -> dict[tuple[str, str], float]:
        text = httpx.get(server.url + "/metrics").text
        return {
            (sample.name, sample.labels.get("position", sample.labels.get("drafter", ""))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "spec_decode" in sample.name or "draft" in sample.name
        }

    before = counted()
    metrics = httpx.post(server.url + "/v1/completions", json=ASKED, timeout=60).json()["perf_metrics"]
    after = counted()
    gained = {key: value - before.get(key, 0.0) for key, value in after.items()}
    accepted, drafted = metrics["speculation-accepted-tokens"], metrics["speculation-generated-tokens"]
    assert gained["vllm:spec_decode_num_accepted_tokens_total", ""] == accepted > 0
    assert gained["vllm:spec_decode_num_draft_tokens_total", ""] == drafted
    assert 0 < gained["vllm:spec_decode_num_drafts_total", ""] <= drafted
    by_position = [v for (name, _), v in gained.items() if name.endswith("_per_pos_total")]
    assert sum(by_position) == accepted
    by_drafter = [v for (name, _), v in gained.items() if name == "myserve:accepted_draft_tokens_total"]
    assert sum(by_drafter) == accepted
