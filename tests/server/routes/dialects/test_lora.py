"""Adapters over HTTP, as vLLM's, SGLang's, prime-rl's and SkyRL's clients load and name them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.adapters import write_adapter
from server.routes.dialects.test_vllm import PROMPT, generate, numbers


@pytest.fixture
def adapters(weights_dir: Path) -> Path:
    """A folder inside the weights directory with the adapters "a", "b" and one of another model's shapes."""
    folder = weights_dir / "adapters"
    for seed, name in enumerate(("a", "b")):
        write_adapter(folder / name, weights_dir / "0", seed=seed)
    return folder


def load(url: str, path: str = "/v1/load_lora_adapter", status: int = 200, **body: Any) -> httpx.Response:
    answer = httpx.post(url + path, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer


def test_vllms_clients_load_name_replace_and_unload(own: Any, adapters: Path) -> None:
    url = own.url
    plain = numbers(generate(url))
    said = load(url, lora_name="x", lora_path="adapters/a").text
    assert said == "Success: LoRA adapter 'x' added successfully."
    first = generate(url, model="x")
    assert first["weight_versions"] == [{"version": "0", "start": 0, "end": 8, "adapter_version": 1}]
    assert numbers(first) != plain and numbers(generate(url)) == plain
    card = next(c for c in httpx.get(url + "/v1/models").json()["data"] if c["id"] == "x")
    assert (card["parent"], card["root"], card["adapter_version"]) == ("tiny", "adapters/a", 1)
    assert httpx.get(url + "/v1/models/x").json() == card
    replica = httpx.get(url + "/hot_load/v1/models/hot_load").json()["replicas"][0]
    loaded = {"identity": "adapters/a", "status": "loaded", "name": "x", "adapter_version": 1}
    assert replica["loaded_adapters"] == [loaded]
    taken = load(url, status=400, lora_name="x", lora_path="adapters/b").json()["error"]
    assert "load_inplace" in taken["message"]
    assert numbers(generate(url, model="x")) == numbers(first)
    load(url, lora_name="x", lora_path=str(adapters / "b"), load_inplace=True)
    second = generate(url, model="x")
    assert second["weight_versions"][0]["adapter_version"] == 2
    assert numbers(second) not in (plain, numbers(first)), "the cached prefix is of the version before"
    body = {"model": "x", "prompt": PROMPT, "max_tokens": 8, "seed": 3, "logprobs": 0, "ignore_eos": True}
    choice = httpx.post(url + "/v1/completions", json=body | {"return_token_ids": True}).json()["choices"][0]
    assert choice["token_ids"] == second["token_ids"] and choice["adapter_version"] == 2
    chat = {"model": "x", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert httpx.post(url + "/v1/chat/completions", json=chat).json()["model"] == "x"
    assert load(url, "/v1/unload_lora_adapter", lora_name="x").text.startswith("Success")
    gone = httpx.post(url + "/v1/completions", json=body)
    assert gone.status_code == 404 and "'x' is not served" in gone.json()["error"]["message"]
    load(url, "/v1/unload_lora_adapter", status=404, lora_name="x")


def test_sglangs_clients_name_adapters_by_lora_path(own: Any, adapters: Path) -> None:
    url = own.url
    assert load(url, "/load_lora_adapter", lora_name="a", lora_path="adapters/a", pinned=True).json()[
        "success"
    ]
    both = load(url, "/load_lora_adapter", lora_name="b", lora_path="adapters/b").json()
    assert both["loaded_adapters"] == {"a": "adapters/a", "b": "adapters/b"} and both["status"] == "ok"

    def native(lora_path: Any, count: int) -> list[Any]:
        sampling = {"max_new_tokens": 6, "sampling_seed": 3, "ignore_eos": True}
        body = {"input_ids": [PROMPT] * count, "sampling_params": sampling, "return_logprob": True}
        answer = httpx.post(url + "/generate", json=body | {"lora_path": lora_path}, timeout=60)
        assert answer.status_code == 200, answer.text
        return [a["meta_info"]["output_token_logprobs"] for a in answer.json()]

    mixed = native(["a", None, "b"], 3)
    assert len({json.dumps(one) for one in mixed}) == 3
    assert [native("a", 1)[0], native(None, 1)[0]] == [mixed[0], native([None], 1)[0]]
    failed = load(url, "/load_lora_adapter", status=400, lora_name="c", lora_path="adapters/none").json()
    assert failed["success"] is False and "none" in failed["message"]
    left = load(url, "/unload_lora_adapter", lora_name="a").json()
    assert left["loaded_adapters"] == {"b": "adapters/b"}
    missing = httpx.post(url + "/generate", json={"input_ids": PROMPT, "lora_path": "a"})
    assert missing.status_code == 404
    load(url, "/skyrl/v1/load_lora_adapter", lora_name="b", lora_path="adapters/a")
    load(url, status=400, lora_name="tiny", lora_path="adapters/a")
    load(url, status=400, lora_name="out", lora_path="/etc")


@pytest.mark.parametrize("paused", [False, True])
def test_streams_tell_which_version_made_which_token(own: Any, adapters: Path, paused: bool) -> None:
    """A stream keeps the version that it began with; in a pause it goes on with the new one, and says where."""
    url = own.url
    load(url, lora_name="x", lora_path="adapters/a")
    sampling = {"max_tokens": 200, "seed": 3, "logprobs": 1, "ignore_eos": True}
    body = {"model": "x", "token_ids": PROMPT, "sampling_params": sampling, "stream": True}
    begun, spans = threading.Event(), list[Any]()

    def stream() -> None:
        with httpx.stream("POST", url + "/inference/v1/generate", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    spans.extend(choice.get("weight_versions", []))
                    if choice["token_ids"]:
                        begun.set()

    reading = threading.Thread(target=stream)
    reading.start()
    begun.wait(30)
    if paused:
        httpx.post(url + "/pause", params={"mode": "keep"}, timeout=60)
    load(url, lora_name="x", lora_path="adapters/b", load_inplace=True)
    if paused:
        httpx.post(url + "/resume", timeout=60)
    reading.join(60)
    versions = [span["adapter_version"] for span in spans]
    assert versions == ([1, 2] if paused else [1]) and spans[-1]["end"] == 200
