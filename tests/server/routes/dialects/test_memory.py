"""Memory that is released and brought back: the same bits afterwards, and requests in flight are not lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.server.settings import Settings
from runs import thorough

from .test_sglang import generate, numbers, post


@pytest.fixture(params=[thorough("qwen3"), "qwen3_moe", thorough("gemma2")])
def saving(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    open_server: Callable[[Settings], AbstractContextManager[Any]],
) -> Any:
    settings = Settings(models={"tiny": str(tiny_model(request.param))}, enable_memory_saver=True)
    with open_server(settings) as server:
        yield server


def test_what_comes_back_has_the_same_bits(saving: Any) -> None:
    url = saving.url
    before = [numbers(generate(url, [5, 6, seed], seed=seed)) for seed in range(3)]
    checksums = post(url, "/weights_checker", json={"action": "snapshot"})
    assert post(url, "/release_memory_occupation", json={}) == {"success": True}
    assert httpx.get(url + "/is_sleeping").json() == {"is_sleeping": True}
    assert httpx.get(url + "/health_generate").status_code == 200
    # really gone: what is read there now is not the weights
    assert post(url, "/weights_checker", 400, json={"action": "compare"})["success"] is False
    waiting = ThreadPoolExecutor(1).submit(generate, url, [5, 6, 0], seed=0)
    post(url, "/resume_memory_occupation", json={"tags": ["weights"]})
    assert post(url, "/weights_checker", json={"action": "compare"})["payload"] == checksums["payload"]
    assert not waiting.done()
    post(url, "/resume_memory_occupation", json={"tags": ["kv_cache"]})
    assert numbers(waiting.result()) == before[0]
    assert [numbers(generate(url, [5, 6, seed], seed=seed)) for seed in range(3)] == before


def test_requests_in_flight_go_on_with_the_same_tokens(saving: Any, wait_until: Any) -> None:
    url, engine = saving.url, saving.model("tiny").engine
    alone = generate(url, [7, 8], max_new_tokens=300)
    running = ThreadPoolExecutor(1).submit(generate, url, [7, 8], max_new_tokens=300)
    seen = engine.meters.generation_tokens
    wait_until(lambda: engine.meters.generation_tokens > seen + 5)
    post(url, "/sleep", params={"level": 1})
    assert engine.load.num_running == 0
    post(url, "/wake_up", params={"tags": ["weights", "kv_cache"]})
    assert numbers(running.result()) == numbers(alone)


def test_new_weights_wait_until_their_memory_is_there(
    weights_dir: Path, open_server: Callable[[Settings], AbstractContextManager[Any]]
) -> None:
    settings = Settings(
        models={"tiny": str(weights_dir / "0")}, weights_dir=str(weights_dir), enable_memory_saver=True
    )
    with open_server(settings) as server:
        post(server.url, "/release_memory_occupation", json={"tags": ["weights"]})
        told = post(server.url, "/update_weights_from_disk", 400, json={"model_path": "1"})
        assert "resume it" in told["message"]
        post(server.url, "/resume_memory_occupation", json={"tags": ["weights"]})
        post(server.url, "/update_weights_from_disk", json={"model_path": "1"})
        assert generate(server.url)["meta_info"]["weight_version"] == "1"


def test_a_server_that_was_not_told_to_keeps_its_memory(own: Any) -> None:
    assert (
        "--enable-memory-saver"
        in post(own.url, "/release_memory_occupation", 400, json={})["error"]["message"]
    )
    assert (
        "tags" in post(own.url, "/release_memory_occupation", 400, json={"tags": ["gpu"]})["error"]["message"]
    )
    assert "tags may be" in post(own.url, "/wake_up", 400, params={"tags": "gpu"})["error"]["message"]
    post(own.url, "/resume_memory_occupation", json={})
    assert generate(own.url)["meta_info"]["finish_reason"]["type"] == "length"
