"""SGLang's control plane, driven as slime and AReaL drive it; every token is what its mark says."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save

from runs import thorough

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def generate(url: str, prompt: list[int] = PROMPT, seed: int = 3, **sampling: Any) -> dict[str, Any]:
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 8, "sampling_seed": seed, "ignore_eos": True} | sampling,
        "return_logprob": True,
    }
    if "rid" in sampling:
        body["rid"] = body["sampling_params"].pop("rid")
    answer = httpx.post(url + "/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def numbers(answer: dict[str, Any]) -> list[tuple[int, float]]:
    return [(i, logprob) for logprob, i, _ in answer["meta_info"]["output_token_logprobs"]]


def post(url: str, path: str, status: int = 200, **sent: Any) -> Any:
    answer = httpx.post(url + path, timeout=60, **sent)
    assert answer.status_code == status, answer.text
    return answer.json() if answer.content else None


def check(answer: dict[str, Any], prompt: list[int], judge: Callable[..., Any]) -> None:
    meta = answer["meta_info"]
    assert numbers(answer) == judge(prompt, answer["output_ids"], meta["seed"], meta["weight_versions"])


def test_areal_pauses_updates_from_disk_and_continues(
    own: Any, weights_dir: Path, judge: Callable[..., Any]
) -> None:
    """The calls of `areal.engine.sglang_remote`."""
    before = generate(own.url)
    assert httpx.post(own.url + "/pause_generation").json()["status"] == "ok"
    sent = {"model_path": str(weights_dir / "1"), "abort_all_request": True}
    told = post(own.url, "/update_weights_from_disk", json=sent)
    assert (told["success"], told["num_paused_requests"]) == (True, 0)
    assert httpx.post(own.url + "/continue_generation").json()["status"] == "ok"
    after = generate(own.url)
    assert (before["meta_info"]["weight_version"], after["meta_info"]["weight_version"]) == ("0", "1")
    for answer in (before, after):
        check(answer, PROMPT, judge)


def test_slime_sends_buckets_of_tensors_with_a_version(own: Any, weights_dir: Path) -> None:
    """pause, flush, several buckets with one version, continue; safetensors where slime pickles."""
    tensors = load_file(weights_dir / "2" / "model.safetensors")
    names = sorted(tensors)
    post(own.url, "/pause_generation", json={})
    assert httpx.get(own.url + "/flush_cache").status_code == 200
    first = save({name: tensors[name] for name in names[:12]})
    second = save({name: tensors[name] for name in names[12:]})
    sent = {
        "serialized_named_tensors": [base64.b64encode(first).decode()],
        "load_format": "safetensors",
        "flush_cache": False,
        "weight_version": "7",
    }
    assert post(own.url, "/update_weights_from_tensor", json=sent)["weight_version"] == "7"
    raw = {"content-type": "application/octet-stream"}
    told = post(
        own.url, "/update_weights_from_tensor", content=second, headers=raw, params={"weight_version": "7"}
    )
    assert told["success"] and told["weight_version"] == "7"
    post(own.url, "/continue_generation", json={})
    after = generate(own.url)
    assert after["meta_info"]["weight_version"] == "7"
    assert httpx.get(own.url + "/get_weight_version").json() == {"weight_version": "7"}
    told = post(own.url, "/update_weights_from_disk", json={"model_path": "2", "weight_version": "step-9"})
    again = generate(own.url)
    assert numbers(again) == numbers(after) and again["meta_info"]["weight_version"] == "step-9"


def streams(url: str, stop: threading.Event, seed: int) -> list[dict[str, Any]]:
    answers = []
    while not stop.is_set():
        answers.append(generate(url, [*PROMPT, seed], seed=seed + 1000 * len(answers), max_new_tokens=60))
    return answers


@pytest.mark.parametrize("mode", ["in_place", thorough("retract")])
def test_every_token_under_32_streams_is_what_its_marked_version_gives(
    own: Any, judge: Callable[..., Any], mode: str
) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(32) as pool:
        running = [pool.submit(streams, own.url, stop, seed) for seed in range(32)]
        for version in (1, 2, 3):
            time.sleep(0.3)
            post(own.url, "/pause_generation", json={"mode": mode})
            post(own.url, "/update_weights_from_disk", json={"model_path": str(version)})
            post(own.url, "/continue_generation", json={})
        time.sleep(0.3)
        stop.set()
        answers = [([*PROMPT, seed], a) for seed, future in enumerate(running) for a in future.result()]
    assert {a["meta_info"]["finish_reason"]["type"] for _, a in answers} == {"length"}
    crossed = [(p, a) for p, a in answers if len(a["meta_info"]["weight_versions"]) > 1]
    assert len(crossed) >= 10
    if mode == "retract":
        assert any(s.get("recomputed") for _, a in crossed for s in a["meta_info"]["weight_versions"])
    for prompt, answer in crossed[:40]:
        check(answer, prompt, judge)
    # the control: a mark that is off by one token
    prompt, answer = crossed[0]
    spans = answer["meta_info"]["weight_versions"]
    moved = [spans[0] | {"end": spans[0]["end"] + 1}, spans[1] | {"start": spans[1]["start"] + 1}, *spans[2:]]
    assert numbers(answer) != judge(prompt, answer["output_ids"], answer["meta_info"]["seed"], moved)


def in_flight(own: Any, count: int, wait_until: Any) -> list[Any]:
    engine = own.model("tiny").engine
    seen = engine.meters.generation_tokens + 2 * count
    pool = ThreadPoolExecutor(count)
    running = [
        pool.submit(generate, own.url, [*PROMPT, i], max_new_tokens=400, rid=f"r{i}") for i in range(count)
    ]
    wait_until(lambda: engine.load.num_running == count and engine.meters.generation_tokens > seen)
    return running


def test_a_pause_aborts_unless_told_otherwise_and_newcomers_wait(own: Any, wait_until: Any) -> None:
    running = in_flight(own, 3, wait_until)
    post(own.url, "/pause_generation", json={})
    for answer in (future.result() for future in running):
        meta = answer["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert not meta["finish_reason"]["message"].startswith("Abort before prefill")
        assert 0 < meta["completion_tokens"] == len(numbers(answer)) == len(answer["output_ids"])
    newcomer = ThreadPoolExecutor(1).submit(generate, own.url, rid="late")
    wait_until(lambda: own.model("tiny").engine.load.num_waiting == 1)
    post(own.url, "/abort_request", json={"rid": "late"})
    reason = newcomer.result()["meta_info"]["finish_reason"]
    assert reason == {"type": "abort", "message": "Abort before prefill"}
    post(own.url, "/continue_generation")
    assert generate(own.url)["meta_info"]["finish_reason"]["type"] == "length"


def test_requests_are_aborted_by_rid_or_all_until_idle(own: Any, wait_until: Any) -> None:
    """`slime.backends.sglang_utils.server_control.abort_server_until_idle`."""
    running = in_flight(own, 3, wait_until)
    load = httpx.get(own.url + "/v1/loads", params={"include": "core,disagg,queues"}).json()["loads"]
    assert load[0]["num_total_reqs"] == 3
    post(own.url, "/abort_request", json={"rid": "r1"})
    assert running[1].result()["meta_info"]["finish_reason"]["type"] == "abort"
    post(own.url, "/abort_request", json={"abort_all": True})
    for future in running:
        future.result()
    wait_until(lambda: httpx.get(own.url + "/v1/loads").json()["loads"][0]["num_total_reqs"] == 0)


def test_a_new_name_for_the_weights_ends_no_request(own: Any, wait_until: Any) -> None:
    (running,) = in_flight(own, 1, wait_until)
    told = post(own.url, "/update_weight_version", json={"new_version": "v2"})
    assert told["success"] and told["new_version"] == "v2"
    assert running.result()["meta_info"]["finish_reason"]["type"] == "length"
    (running,) = in_flight(own, 1, wait_until)
    post(own.url, "/update_weight_version", json={"new_version": "v3", "abort_all_requests": True})
    assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"


def test_an_update_without_a_pause_lets_requests_finish_or_ends_them(own: Any, wait_until: Any) -> None:
    (running,) = in_flight(own, 1, wait_until)
    post(own.url, "/update_weights_from_disk", json={"model_path": "1"})
    meta = running.result()["meta_info"]
    assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 400}]
    (running,) = in_flight(own, 1, wait_until)
    sent = {"model_path": "2", "abort_all_requests": True, "keep_pause": True}
    post(own.url, "/update_weights_from_disk", json=sent)
    assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert httpx.get(own.url + "/is_paused").json() == {"is_paused": True}


def test_slime_takes_it_as_an_external_engine(own: Any) -> None:
    """What `--rollout-external-engine-addrs` reads, and what it compares."""
    for path in ("/server_info", "/get_server_info"):
        info = httpx.get(own.url + path, params={"config_format": "json"}).json()
        wanted = {
            "tp_size": 1,
            "pp_size": 1,
            "num_gpus": 1,
            "disaggregation_mode": "null",
            "encoder_only": False,
        }
        assert {name: info[name] for name in wanted} == wanted
        compared = {"enable_memory_saver": False, "nnodes": 1, "node_rank": 0, "gpu_id_step": 1, "dp_size": 1}
        assert {name: info[name] for name in compared} == compared
    assert info["vllm_config"]["model_config"]["max_model_len"] == 512
    assert httpx.get(own.url + "/health_generate").status_code == 200
    post(own.url, "/pause_generation", json={"mode": "in_place"})
    assert httpx.get(own.url + "/health_generate").status_code == 200
    post(own.url, "/continue_generation")
    for path in ("/model_info", "/get_model_info"):
        assert httpx.get(own.url + path).json()["is_generation"] is True


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/pause_generation", {"json": {"mode": "later"}}, "mode"),
    ("/abort_request", {"json": {}}, "send rid, or abort_all"),
    ("/abort_request", {"json": {"rid": 3}}, "rid"),
    ("/continue_generation", {"content": b"["}, "not valid JSON"),
]
BAD_UPDATES: list[tuple[str, dict[str, Any], str]] = [
    ("/update_weights_from_disk", {"json": {}}, "model_path"),
    ("/update_weights_from_disk", {"json": {"model_path": "nothing"}}, "not a folder"),
    ("/update_weights_from_disk", {"json": {"model_path": "/etc"}}, "no folder inside"),
    ("/update_weights_from_disk", {"json": {"model_path": "1", "load_format": "gguf"}}, "load_format"),
    ("/update_weights_from_disk", {"json": {"model_path": "1", "manifest": {"a": 1}}}, "manifest"),
    ("/update_weights_from_tensor", {"json": {"serialized_named_tensors": ["gASV"]}}, "never read"),
    ("/update_weights_from_tensor", {"json": {"serialized_named_tensors": []}}, "serialized_named_tensors"),
    (
        "/update_weights_from_tensor",
        {"json": {"serialized_named_tensors": ["?"], "load_format": "safetensors"}},
        "not base64",
    ),
    (
        "/update_weights_from_tensor",
        {"content": b"abc", "headers": {"content-type": "application/octet-stream"}},
        "no safetensors",
    ),
    ("/update_weights_from_distributed", {"json": {"names": []}}, "no process group"),
    ("/update_weights_from_ipc", {"json": {}}, "no process group"),
    ("/init_weights_update_group", {"json": {"master_address": "h"}}, "no process group"),
    ("/destroy_weights_update_group", {"json": {}}, "no process group"),
    ("/update_weight_version", {"json": {"new_version": ""}}, "new_version"),
]


def test_what_is_bad_is_a_400_in_their_shape_and_nothing_changes(own: Any) -> None:
    before = numbers(generate(own.url))
    for path, sent, words in BAD:
        assert words in post(own.url, path, 400, **sent)["error"]["message"], path
    for path, sent, words in BAD_UPDATES:
        told = post(own.url, path, 400, **sent)
        assert told["success"] is False and words in told["message"], (path, told)
        assert told["error"]["message"] == told["message"]
    assert numbers(generate(own.url)) == before
