"""New weights over HTTP: both protocols, from the operator's directory alone, and what is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_tiny_model
from myserve.engine.weights.snapshot import weights_checksum
from myserve.server.settings import Settings
from myserve.wire.sse import DONE_DATA, SSEDecoder

HOT_LOAD = "/hot_load/v1/models/hot_load"
DEPLOYMENT = {"fireworks-model": "accounts/a/models/m", "fireworks-deployment": "accounts/a/deployments/d"}


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots `0`, `1` and `2`, a torn one, a part of one; and one that lies outside."""
    root = tmp_path_factory.mktemp("weights")
    inside = root / "inside"
    for seed in range(3):
        make_tiny_model("qwen3", inside / str(seed), seed=seed)
    (inside / "torn").mkdir()
    data = (inside / "1" / "model.safetensors").read_bytes()
    (inside / "torn" / "model.safetensors").write_bytes(data[:-1])
    tensors = load_file(inside / "2" / "model.safetensors")
    (inside / "part").mkdir()
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, inside / "part" / "a.safetensors")
    (inside / "nan").mkdir()
    save_file(tensors | {"model.norm.weight": torch.full((32,), torch.nan)}, inside / "nan" / "a.safetensors")
    shutil.copytree(inside / "1", root / "outside")
    (inside / "link").symlink_to(root / "outside")
    return inside


@pytest.fixture
def own(weights_dir: Path, open_server: Callable[[Settings], AbstractContextManager[Any]]) -> Iterator[Any]:
    """A server of this test's own: its weights change."""
    path = str(weights_dir / "0")
    models = {"tiny": path, "accounts/a/deployments/d": path}
    with open_server(Settings(models=models, weights_dir=str(weights_dir))) as server:
        yield server


@pytest.fixture
def url(own: Any) -> str:
    url: str = own.url
    return url


def complete(url: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 8, "seed": 3, "logprobs": True} | fields
    answer = httpx.post(url + "/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def logprobs(choice: dict[str, Any]) -> list[tuple[int, float]]:
    return [(entry["token_id"], entry["logprob"]) for entry in choice["logprobs"]["content"]]


def test_v1_weights_answers_when_they_are_in_place(url: str, weights_dir: Path) -> None:
    before = complete(url)
    assert before["weight_version"] == 0
    answer = httpx.post(url + "/v1/weights", json={"path": "1"}, timeout=60)
    report = answer.json()
    assert (report["weight_version"], report["identity"], report["num_tensors"]) == (1, "1", 25)
    assert report["checksum"] == weights_checksum(weights_dir / "1")
    after = complete(url)
    assert after["weight_version"] == 1 and logprobs(after) != logprobs(before)
    again = {"path": str(weights_dir / "0"), "version": 7, "checksum": weights_checksum(weights_dir / "0")}
    assert httpx.post(url + "/v1/weights", json=again, timeout=60).json()["weight_version"] == 7
    assert logprobs(complete(url)) == logprobs(before)
    weights = httpx.get(url + "/version").json()["weights"]["tiny"]
    assert weights == {"weight_version": 7, "identity": str(weights_dir / "0")}
    health = httpx.get(url + "/health")
    assert health.json() == {"status": "ok"}
    assert '"tiny":7' in health.headers["myserve-weight-versions"]
    assert httpx.get(url + "/v1/weights").json()["models"]["tiny"]["checksum"] == again["checksum"]


BAD = [
    ({"path": "torn"}, "torn", "bad_snapshot"),
    ({"path": "nan"}, "model.norm.weight has values that are not finite", "bad_snapshot"),
    ({"path": "part"}, "say partial", "bad_snapshot"),
    ({"path": "nothing"}, "not a folder", "bad_snapshot"),
    ({"path": "1", "checksum": "sha256:0"}, "the checksum is", "bad_snapshot"),
    ({"path": "1", "version": 0}, "must grow", None),
    ({"path": "1", "mode": "later"}, "mode", "invalid_value"),
    ({"path": "../outside"}, "no folder inside", "bad_snapshot"),
    ({"path": "link"}, "no folder inside", "bad_snapshot"),
    ({"path": "/"}, "no folder inside", "bad_snapshot"),
    ({"path": "."}, "no folder inside", "bad_snapshot"),
    ({"path": "1/../../outside"}, "no folder inside", "bad_snapshot"),
    ({"path": "a\u0000b"}, "no folder inside", "bad_snapshot"),
    ({}, "path", "missing_required_parameter"),
]


def test_what_is_bad_is_a_400_and_the_old_weights_serve(url: str) -> None:
    before = complete(url)
    for body, words, code in BAD:
        answer = httpx.post(url + "/v1/weights", json=body, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, code), (body, error)
        assert words in error["message"]
        if "path" in body and code == "bad_snapshot":
            loaded = httpx.post(url + HOT_LOAD, json={"identity": body["path"]} | body, timeout=60)
            assert loaded.status_code == 400, body
    assert complete(url) == before


def test_a_model_that_is_not_served_is_a_404(url: str) -> None:
    assert httpx.post(url + "/v1/weights", json={"path": "1", "model": "x"}).status_code == 404
    headers = {"fireworks-deployment": "accounts/a/deployments/x"}
    assert httpx.post(url + HOT_LOAD, json={"identity": "1"}, headers=headers).status_code == 404
    assert httpx.get(url + HOT_LOAD, headers=headers).status_code == 404


def test_a_server_without_a_weights_directory_takes_none(server: Any) -> None:
    for path, body in [("/v1/weights", {"path": "1"}), (HOT_LOAD, {"identity": "1"})]:
        answer = httpx.post(server.url + path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "weights_disabled")


def hot_loaded(url: str, identity: str) -> dict[str, Any]:
    """As Fireworks' client waits for it: replicas, readiness, the current identity; an error of this target ends it."""
    for _ in range(2000):
        (replica,) = httpx.get(url + HOT_LOAD, headers=DEPLOYMENT).json()["replicas"]
        if replica["readiness"] and replica["current_snapshot_identity"] == identity:
            return dict(replica)
        state = replica["loading_state"]
        assert (state["stage"], state["target_snapshot_identity"]) != ("error", identity)
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_fireworks_hot_load(url: str) -> None:
    (replica,) = httpx.get(url + HOT_LOAD, headers=DEPLOYMENT).json()["replicas"]
    assert replica["current_snapshot_identity"] is None and replica["readiness"] is True
    assert replica["loading_state"] == {"stage": "idle", "target_snapshot_identity": None}
    before = complete(url)
    body = {"identity": "2", "reset_prompt_cache": True}
    assert httpx.post(url + HOT_LOAD, json=body, headers=DEPLOYMENT, timeout=60).status_code == 200
    assert hot_loaded(url, "2")["loading_state"] == {"stage": "done", "target_snapshot_identity": "2"}
    warm_up = httpx.post(
        url + "/inference/v1/completions",
        json={"model": DEPLOYMENT["fireworks-deployment"], "prompt": [1, 2], "max_tokens": 4, "temperature": 0},
    )  # fmt: skip
    assert warm_up.status_code == 200
    assert logprobs(complete(url)) != logprobs(before)
    failed = httpx.post(url + HOT_LOAD, json={"identity": "torn"}, headers=DEPLOYMENT, timeout=60)
    assert failed.status_code == 400
    (replica,) = httpx.get(url + HOT_LOAD, headers=DEPLOYMENT).json()["replicas"]
    assert replica["current_snapshot_identity"] == "2"
    assert replica["loading_state"]["stage"] == "error"
    assert replica["loading_state"]["target_snapshot_identity"] == "torn"


def test_a_delta_needs_what_it_builds_on_and_whole_tensors(url: str) -> None:
    httpx.post(url + HOT_LOAD, json={"identity": "1"}, timeout=60)
    hot_loaded(url, "1")
    before = complete(url)

    def delta(**metadata: str) -> httpx.Response:
        body = {"identity": "part", "incremental_snapshot_metadata": metadata}
        return httpx.post(url + HOT_LOAD, json=body, timeout=60)

    for metadata, words in [
        ({"previous_snapshot_identity": "0"}, "builds on '0'"),
        ({"previous_snapshot_identity": "1", "compression_format": "arc_v2"}, "compression_format"),
        ({"previous_snapshot_identity": "1", "checksum_format": "alder32"}, "checksum_format"),
    ]:
        refused = delta(**metadata)
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]
    good = delta(previous_snapshot_identity="1", compression_format="none", checksum_format="sha256")
    assert good.status_code == 200
    hot_loaded(url, "part")
    assert logprobs(complete(url)) != logprobs(before)
    elsewhere = {"x-fireworks-hot-load-source-url": "gs://bucket/prefix"}
    assert httpx.post(url + HOT_LOAD, json={"identity": "1"}, headers=elsewhere).status_code == 400


class Flight:
    """A stream that is on its way once `begun` is set, and what its last chunk said."""

    def __init__(self, client: httpx.AsyncClient, **fields: Any) -> None:
        self._body = {"model": "tiny", "prompt": [5, 6], "stream": True, "return_token_ids": True} | fields
        self._client = client
        self.begun = asyncio.Event()
        self.ids: list[int] = []
        self.task = asyncio.create_task(self._fly())

    async def _fly(self) -> dict[str, Any]:
        choice: dict[str, Any] = {}
        decoder = SSEDecoder()
        async with self._client.stream("POST", "/v1/completions", json=self._body) as answer:
            async for data in answer.aiter_bytes():
                for event in decoder.feed(data):
                    if event.data != DONE_DATA:
                        (choice,) = json.loads(event.data)["choices"]
                        self.ids += choice["token_ids"]
                        self.begun.set()
        return choice


def test_requests_in_flight_keep_their_marks_or_get_what_they_have(
    own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, runner = own.url, own.model("tiny").engine.runner
    run = runner.run

    def slowly(batch: Any) -> Any:  # so that a flight outlasts an update on any machine
        time.sleep(0.01)
        return run(batch)

    monkeypatch.setattr(runner, "run", slowly)
    long = {"max_tokens": 480, "ignore_eos": True}

    async def scene() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=100) as client:

            async def flight() -> Flight:
                begun = Flight(client, **long)
                await begun.begun.wait()
                return begun

            async def update(**fields: Any) -> dict[str, Any]:
                report: dict[str, Any] = (await client.post("/v1/weights", json=fields)).json()
                return report

            kept = await flight()
            assert (await update(path="1", mode="keep"))["num_aborted"] == 0
            last = await kept.task
            first, second = last["weight_version_spans"]
            assert (first["weight_version"], second["weight_version"]) == (0, 1)
            assert (first["start"], first["end"], second["end"]) == (0, second["start"], 480)

            drained = await flight()
            waiting = asyncio.create_task(update(path="2", new_requests="refuse"))
            while (await client.get("/v1/weights")).json()["models"]["tiny"]["loading_state"][
                "stage"
            ] != "draining":
                assert not drained.task.done()
            refused = await client.post("/v1/completions", json={"model": "tiny", "prompt": [1]})
            assert (refused.status_code, refused.json()["error"]["code"]) == (425, "weights_loading")
            assert int(refused.headers["retry-after"]) >= 1
            last = await drained.task
            assert last["weight_version"] == 1 and "weight_version_spans" not in last
            assert (await waiting)["weight_version"] == 2

            cut = await flight()
            assert (await update(path="0", mode="abort"))["num_aborted"] == 1
            assert (await cut.task)["finish_reason"] == "abort"
            assert 0 < len(cut.ids) < 480

    asyncio.run(scene())


@pytest.mark.parametrize("version", [2**64, 2**63, -1, 1.5, "7"])
def test_a_version_out_of_range_changes_nothing(url: str, version: object) -> None:
    """A number that no answer could carry would make every later answer an error."""
    for path, body in [("/v1/weights", {"path": "1"}), (HOT_LOAD, {"identity": "1"})]:
        answer = httpx.post(url + path, json=body | {"version": version})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "version")
    assert complete(url)
    assert httpx.get(url + "/version").json()["weights"]["tiny"]["weight_version"] == 0


def test_the_largest_version_can_be_answered_and_followed(url: str) -> None:
    for body, expected in [({"path": "1", "version": 2**63 - 1}, 2**63 - 1), ({"path": "2"}, 2**63)]:
        answer = httpx.post(url + "/v1/weights", json=body, timeout=60)
        assert (answer.status_code, answer.json()["weight_version"]) == (200, expected)
        assert complete(url)
        assert httpx.get(url + "/metrics").status_code == 200
