"""vLLM's RL control plane, driven as prime-rl, SkyRL and TRL drive it; every token is what its mark says."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def generate(url: str, prompt: list[int] = PROMPT, **fields: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 8, "seed": 3, "logprobs": 1, "ignore_eos": True} | fields.pop("sampling", {})
    body = {"model": "tiny", "token_ids": prompt, "sampling_params": sampling} | fields
    answer = httpx.post(url + "/inference/v1/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def numbers(choice: dict[str, Any]) -> list[tuple[int, float]]:
    return [(entry["token_id"], entry["logprob"]) for entry in choice["logprobs"]["content"]]


def post(url: str, path: str, status: int = 200, **sent: Any) -> dict[str, Any]:
    answer = httpx.post(url + path, timeout=60, **sent)
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    return body


def safetensors_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_prime_rl_pauses_updates_from_a_folder_and_resumes(
    own: Any, weights_dir: Path, judge: Callable[..., Any]
) -> None:
    """In the order of `prime_rl.utils.client.update_weights`; its paths are absolute."""
    before = generate(own.url)
    assert before["weight_versions"] == [{"version": "0", "start": 0, "end": 8}]
    assert post(own.url, "/pause", params={"mode": "keep", "clear_cache": "false"}) == {"status": "paused"}
    assert httpx.get(own.url + "/is_paused").json() == {"is_paused": True}
    post(own.url, "/update_weights", json={"weight_dir": str(weights_dir / "1")})
    assert post(own.url, "/resume") == {"status": "resumed"}
    assert httpx.get(own.url + "/is_paused").json() == {"is_paused": False}
    after = generate(own.url)
    assert after["weight_versions"] == [{"version": "1", "start": 0, "end": 8}]
    assert httpx.get(own.url + "/weight_info").json() == {"weight_version": "1"}
    for choice in (before, after):
        ids = choice["token_ids"]
        assert numbers(choice) == judge(PROMPT, ids, choice["seed"], choice["weight_versions"])
    assert numbers(before) != numbers(after)


def test_weights_come_in_parts_over_http_and_are_put_in_place_together(own: Any, weights_dir: Path) -> None:
    """vLLM's own order of calls: init, start, updates, finish with a version."""
    post(own.url, "/init_weight_transfer_engine", json={"init_info": {"backend": "http"}})
    tensors = load_file(weights_dir / "2" / "model.safetensors")
    names = sorted(tensors)
    first = save({name: tensors[name] for name in names[:10]})
    second = save({name: tensors[name] for name in names[10:]})
    unchanged = numbers(generate(own.url))
    post(own.url, "/start_weight_update")
    raw = {"content-type": "application/octet-stream"}
    post(own.url, "/update_weights", content=first, headers=raw)
    assert numbers(generate(own.url)) == unchanged  # a part alone changes nothing
    sent = {"update_info": {"safetensors": base64.b64encode(second).decode()}}
    post(own.url, "/update_weights", json=sent)
    assert httpx.get(own.url + "/weight_info").json() == {"weight_version": "0"}
    post(own.url, "/finish_weight_update", json={"weight_version": "step-7"})
    assert httpx.get(own.url + "/weight_info").json() == {"weight_version": "step-7"}
    after = generate(own.url)
    assert after["weight_versions"] == [{"version": "step-7", "start": 0, "end": 8}]
    httpx.post(own.url + "/update_weights", json={"weight_dir": "2"}, timeout=60).raise_for_status()
    assert numbers(generate(own.url)) == numbers(after)
    assert post(own.url, "/update_weight_version", json={"new_version": "9"})["new_version"] == "9"
    assert httpx.get(own.url + "/weight_info").json() == {"weight_version": "9"}


def test_a_label_that_is_a_number_is_the_version_in_our_own_words(own: Any) -> None:
    post(own.url, "/update_weights", json={"weight_dir": "1", "weight_version": "40"})
    assert generate(own.url)["weight_version"] == 40
    # it has not grown: the next number is taken, and it is called as the client says
    post(own.url, "/update_weights", json={"weight_dir": "2", "weight_version": "3"})
    choice = generate(own.url)
    assert choice["weight_version"] == 41 and choice["weight_versions"][0]["version"] == "3"


def streams(url: str, stop: threading.Event, seed: int) -> list[dict[str, Any]]:
    answers = []
    while not stop.is_set():
        sampling = {"seed": seed + 1000 * len(answers), "max_tokens": 60}
        answers.append(generate(url, [*PROMPT, seed], sampling=sampling))
    return answers


def updated_under_streams(url: str, update: Callable[[int], None], count: int = 32) -> list[dict[str, Any]]:
    """All answers of `count` clients while weights 1, 2 and 3 come in."""
    stop = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(streams, url, stop, seed) for seed in range(count)]
        for version in (1, 2, 3):
            time.sleep(0.3)
            update(version)
        time.sleep(0.3)
        stop.set()
        return [
            answer | {"prompt": [*PROMPT, seed]}
            for seed, future in enumerate(running)
            for answer in future.result()
        ]


def check_marks(answers: list[dict[str, Any]], judge: Callable[..., Any], most: int = 40) -> None:
    """Each answer that saw a swap, and some that did not, is computed again by its marks."""
    crossed = [a for a in answers if len(a["weight_versions"]) > 1]
    assert len(crossed) >= 10, "the weights were swapped between requests, not inside"
    for answer in crossed[:most] + [a for a in answers if len(a["weight_versions"]) == 1][:10]:
        wanted = judge(answer["prompt"], answer["token_ids"], answer["seed"], answer["weight_versions"])
        assert numbers(answer) == wanted
    # the control: a mark that is off by one token
    spans = crossed[0]["weight_versions"]
    moved = [spans[0] | {"end": spans[0]["end"] + 1}, spans[1] | {"start": spans[1]["start"] + 1}, *spans[2:]]
    answer = crossed[0]
    assert numbers(answer) != judge(answer["prompt"], answer["token_ids"], answer["seed"], moved)


def test_every_token_under_32_streams_is_what_its_marked_version_gives(
    own: Any, judge: Callable[..., Any]
) -> None:
    def update(version: int) -> None:
        post(own.url, "/pause", params={"mode": "keep"})
        post(own.url, "/update_weights", json={"weight_dir": str(version)})
        post(own.url, "/resume")

    answers = updated_under_streams(own.url, update)
    assert {a["finish_reason"] for a in answers} == {"length"}, "an update ended a request"
    check_marks(answers, judge)


def in_flight(own: Any, count: int, wait_until: Any, **sampling: Any) -> list[Any]:
    """So many requests, each with some tokens."""
    engine = own.model("tiny").engine
    seen = engine.meters.generation_tokens + 2 * count
    pool = ThreadPoolExecutor(count)
    asked = {"max_tokens": 400} | sampling
    running = [
        pool.submit(generate, own.url, [*PROMPT, i], sampling=asked, request_id=f"r{i}") for i in range(count)
    ]
    wait_until(lambda: engine.load.num_running == count and engine.meters.generation_tokens > seen)
    return running


def test_a_pause_that_aborts_ends_requests_with_what_they_have(own: Any, wait_until: Any) -> None:
    running = in_flight(own, 4, wait_until)
    post(own.url, "/pause")
    for choice in (future.result() for future in running):
        assert choice["finish_reason"] == "abort"
        assert 0 < len(choice["token_ids"]) == len(numbers(choice)) < 400
    newcomer = ThreadPoolExecutor(1).submit(generate, own.url)
    wait_until(lambda: own.model("tiny").engine.load.num_waiting == 1)
    assert not newcomer.done()
    post(own.url, "/resume")
    assert newcomer.result()["finish_reason"] == "length"


def test_a_pause_that_waits_lets_requests_finish(own: Any, wait_until: Any) -> None:
    running = in_flight(own, 4, wait_until)
    post(own.url, "/pause", params={"mode": "wait"})
    engine = own.model("tiny").engine
    assert engine.is_paused and engine.load.num_running == 0
    assert [len(future.result()["token_ids"]) for future in running] == [400] * 4
    post(own.url, "/resume")


def test_a_kept_request_goes_on_after_the_pause_with_the_same_tokens(own: Any, wait_until: Any) -> None:
    alone = generate(own.url, [*PROMPT, 0], sampling={"max_tokens": 400})
    (running,) = in_flight(own, 1, wait_until)
    post(own.url, "/pause", params={"mode": "keep"})
    post(own.url, "/resume")
    assert numbers(running.result()) == numbers(alone)


def test_requests_are_aborted_by_their_ids(own: Any, wait_until: Any) -> None:
    running = in_flight(own, 3, wait_until)
    assert post(own.url, "/abort_requests", json={"request_ids": ["r1", "x"]}) == {
        "status": "aborted",
        "aborted": 1,
    }
    assert running[1].result()["finish_reason"] == "abort"
    assert post(own.url, "/inference/v1/abort_requests", json={})["aborted"] == 2
    assert {running[i].result()["finish_reason"] for i in (0, 2)} == {"abort"}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/pause", {"params": {"mode": "later"}}, "mode must be one of"),
    ("/abort_requests", {"json": {"request_ids": 3}}, "request_ids"),
    ("/abort_requests", {"json": [1]}, "must be a JSON object"),
    ("/init_weight_transfer_engine", {"json": {}}, "init_info"),
    ("/init_weight_transfer_engine", {"json": {"init_info": {"master_address": "h"}}}, "no process group"),
    ("/start_draft_weight_update", {}, "no draft model"),
    ("/update_weights", {"json": {}}, "either weight_dir or update_info"),
    ("/update_weights", {"json": {"weight_dir": "../x"}}, "no folder inside"),
    ("/update_weights", {"json": {"weight_dir": "/etc"}}, "no folder inside"),
    ("/update_weights", {"json": {"weight_dir": "nothing"}}, "not a folder"),
    ("/update_weights", {"json": {"update_info": {"names": ["w"], "shapes": [[1]]}}}, "no process"),
    ("/update_weights", {"json": {"update_info": {"safetensors": "%%"}}}, "not base64"),
    ("/update_weights", {"json": {"update_info": {"safetensors": "AAAA"}}}, "no safetensors"),
    ("/update_weights", {"content": b"\x00" * 40, "headers": {"content-type": "application/octet-stream"}}, "no safe"),
    ("/update_weights", {"content": b"{"}, "not valid JSON"),
    ("/finish_weight_update", {"json": {"weight_version": "1"}}, "no weight update was begun"),
    ("/finish_weight_update", {"json": {"weight_version": ""}}, "weight_version"),
    ("/update_weight_version", {"json": {}}, "new_version"),
    ("/update_weight_version", {"json": {"new_version": 3}}, "new_version"),
]  # fmt: skip


def test_what_is_bad_is_a_400_and_nothing_changes(own: Any) -> None:
    before = generate(own.url)
    for path, sent, words in BAD:
        error = post(own.url, path, 400, **sent)["error"]
        assert words in error["message"], (path, sent, error)
    assert generate(own.url) == before
    assert httpx.get(own.url + "/get_world_size", params={"include_dp": "maybe"}).status_code == 400


def test_a_tensor_that_does_not_fit_is_found_at_the_finish(own: Any, weights_dir: Path) -> None:
    before = generate(own.url)
    tensors = load_file(weights_dir / "1" / "model.safetensors")
    raw = {"content-type": "application/x-safetensors"}
    for wrong, words in [
        ({"model.norm.weight": tensors["lm_head.weight"]}, "shape"),
        ({"x.weight": tensors["model.norm.weight"]}, "no x.weight"),
        ({"model.norm.weight": tensors["model.norm.weight"] * float("nan")}, "not finite"),
    ]:
        post(own.url, "/start_weight_update", json={})
        post(own.url, "/update_weights", content=save(wrong), headers=raw)
        assert words in post(own.url, "/finish_weight_update", 400, json={})["error"]["message"]
    post(own.url, "/start_weight_update")
    part = save({"model.norm.weight": tensors["model.norm.weight"]})
    post(own.url, "/update_weights", content=part, headers=raw)
    assert (
        "sent twice" in post(own.url, "/update_weights", 400, content=part, headers=raw)["error"]["message"]
    )
    post(own.url, "/shutdown_weight_transfer_engine")
    assert "no weight update" in post(own.url, "/finish_weight_update", 400)["error"]["message"]
    assert generate(own.url) == before


def test_the_small_routes(own: Any) -> None:
    assert httpx.get(own.url + "/get_world_size", params={"include_dp": "true"}).json() == {"world_size": 1}
    assert httpx.get(own.url + "/liveness").json() == {"status": "alive"}
    prompt = list(range(100, 180))
    usage = []
    for reset in (False, False, True):
        if reset:
            post(own.url, "/reset_prefix_cache")
        body = {"token_ids": prompt, "sampling_params": {"max_tokens": 1}}
        usage.append(post(own.url, "/inference/v1/generate", json=body)["usage"])
    cached = [each["prompt_tokens_details"]["cached_tokens"] for each in usage]
    assert cached[0] == cached[2] == 0 < cached[1]


@pytest.mark.parametrize("path", ["/is_paused", "/weight_info"])
def test_a_model_that_is_not_served_is_a_404(own: Any, path: str) -> None:
    assert httpx.get(own.url + path, params={"model": "x"}).status_code == 404


def test_the_weights_are_what_their_checksums_say(own: Any, weights_dir: Path) -> None:
    """Read back from memory: an update changes them, zeros too, and the same weights give the same again."""
    checker = "/weight_checker"
    first = post(own.url, checker, json={"action": "checksum"})["checksums"]
    tensors = load_file(weights_dir / "0" / "model.safetensors")
    assert first.keys() == tensors.keys()
    digest = hashlib.sha256(tensors["model.norm.weight"].numpy().tobytes()).hexdigest()
    assert first["model.norm.weight"] == digest
    linear = "model.layers.0.self_attn.q_proj.weight"
    assert first[linear] == hashlib.sha256(tensors[linear].numpy().tobytes()).hexdigest()
    assert post(own.url, checker, json={"action": "compare", "baseline": first})["match"] is True
    before = numbers(generate(own.url))
    post(own.url, checker, json={"action": "reset"})
    told = post(own.url, checker, json={"action": "compare", "baseline": first})
    assert told["match"] is False and set(told["mismatches"]) == first.keys()
    assert numbers(generate(own.url)) != before
    post(own.url, "/update_weights", json={"weight_dir": "0"})
    assert post(own.url, checker, json={"action": "compare", "baseline": first})["mismatches"] == []
    assert numbers(generate(own.url)) == before
    short = {name: value for name, value in first.items() if name != linear}
    assert post(own.url, checker, json={"action": "compare", "baseline": short})["mismatches"] == [linear]
    for bad in ({"action": "compare"}, {"action": "x"}, {}):
        post(own.url, checker, 400, json=bad)
