"""A model that really breaks ends its engine; the server loads it again with the same weights, or says why not."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from myserve.engine.config import EngineConfig
from myserve.server.models import restart
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder
from runs import thorough

Open = Callable[[Settings], AbstractContextManager[Any]]
WaitUntil = Callable[[Callable[[], bool]], None]

# A checkpoint with code of its own, whose forward pass breaks on a prompt that says so, as a device does that is lost:
# any other error would be that request's alone. Three in a row: the checks at load run random ids.
BREAKS = 77
CODE = f"""
import torch
from transformers import Qwen3ForCausalLM


class FragileForCausalLM(Qwen3ForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        ids = input_ids.flatten().tolist()
        if any(ids[i : i + 3] == [{BREAKS}] * 3 for i in range(len(ids))):
            raise torch.AcceleratorError("the device is gone")
        return super().forward(input_ids=input_ids, **kwargs)
"""
ASKED = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 12, "seed": 3, "ignore_eos": True}
REPORTS = {"return_token_ids": True, "logprobs": 1}
LONG = ASKED | {"max_tokens": 480, "stream": True}


@pytest.fixture
def fragile(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "fragile.FragileForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "fragile.py").write_text(CODE)
    return folder


@pytest.fixture
def snapshots(fragile: Path, tmp_path: Path) -> Path:
    """ "1" has other weights, "2" builds on it."""
    weights = load_file(fragile / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    one = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in weights.items()}
    two = {n: 1.5 * t for n, t in one.items() if n.endswith("k_proj.weight")}
    for identity, tensors in (("1", one), ("2", two)):
        (tmp_path / "snapshots" / identity).mkdir(parents=True)
        save_file(tensors, tmp_path / "snapshots" / identity / "model.safetensors")
    return tmp_path / "snapshots"


@pytest.fixture
def settings(fragile: Path, snapshots: Path) -> Settings:
    return Settings(
        models={"m": str(fragile)},
        engine=EngineConfig(trust_remote_code=True, num_blocks=256),
        weights_dir=str(snapshots),
        restart_engine=True,
    )


def complete(url: str) -> Any:
    answer = httpx.post(url + "/v1/completions", json=ASKED | REPORTS, timeout=60)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["weight_version"], choice["token_ids"], choice["logprobs"]


def update(url: str, identity: str, **fields: Any) -> None:
    answer = httpx.post(url + "/v1/weights", json={"path": identity} | fields, timeout=60)
    assert answer.status_code == 200, answer.text


def break_it(url: str) -> httpx.Response:
    """By a prompt of a length that no other has: a step that is recorded already runs without the model's Python."""
    return httpx.post(url + "/v1/completions", json=ASKED | {"prompt": [BREAKS] * 20}, timeout=60)


def status(url: str) -> str:
    return str(httpx.get(url + "/health").json()["status"])


def test_everyone_hears_of_it_and_then_it_is_back_with_the_same_weights(
    open_server: Open, settings: Settings, wait_until: WaitUntil
) -> None:
    with open_server(settings) as server:
        before = complete(server.url)
        update(server.url, "1")
        update(server.url, "2", partial=True)
        changed = complete(server.url)
        assert changed[0] == 2 and changed[1:] != before[1:]
        decoder = SSEDecoder()
        with httpx.stream("POST", server.url + "/v1/completions", json=LONG, timeout=60) as stream:
            parts = stream.iter_bytes()
            events = decoder.feed(next(parts))
            broken = break_it(server.url)
            events += [event for part in parts for event in decoder.feed(part)]
        assert broken.status_code == 503 and "AcceleratorError: the device is gone" in broken.text
        assert events[-1].event == "error" and len(events) < 480
        assert httpx.get(server.url + "/health").status_code == 503
        refused = httpx.post(server.url + "/v1/completions", json=ASKED)
        assert refused.status_code == 503

        wait_until(lambda: status(server.url) == "ok")
        assert complete(server.url) == changed
        state = httpx.get(server.url + "/hot_load/v1/models/hot_load").json()["replicas"][0]
        assert (state["current_snapshot_identity"], state["weight_version"]) == ("2", 2)
        assert 'myserve:engine_restarts_total{model_name="m"} 1' in httpx.get(server.url + "/metrics").text
        update(server.url, "1")  # it takes new weights as before
        assert complete(server.url)[0] == 3


def test_the_old_weights_are_gone_before_they_are_read_again(
    open_server: Open,
    settings: Settings,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Twice the weights may be more than the memory holds. Here somebody still holds the engine: a slow client."""
    caplog.set_level("CRITICAL", "myserve.server")  # a record that is kept keeps frames, and those a model
    caplog.set_level(100, "myserve.engine")
    with open_server(settings) as server:
        models, engine = server.app.state.models, server.model("m").engine
        held = [weakref.ref(engine.runner.model), weakref.ref(engine.runner.kv_cache)]
        assert all(memory() is not None for memory in held)
        gone: list[bool] = []
        load = models._load

        def look_then_load(path: str, settings: Settings) -> Any:
            gone.extend(memory() is None for memory in held)
            return load(path, settings)

        monkeypatch.setattr(models, "_load", look_then_load)
        break_it(server.url)
        wait_until(lambda: status(server.url) == "ok")
        assert gone == [True, True]


@pytest.fixture(
    params=[thorough("a snapshot is gone"), "a snapshot is another", thorough("the model is another")]
)
def spoilt(request: pytest.FixtureRequest, fragile: Path, snapshots: Path) -> Callable[[], str]:
    """Spoils what the weights came from; the file that the refusal names."""

    def spoil() -> str:
        if request.param == "a snapshot is gone":
            shutil.rmtree(snapshots / "1")
            return "'1'"
        if request.param == "a snapshot is another":
            tensors = load_file(snapshots / "1" / "model.safetensors")
            save_file({n: -t for n, t in tensors.items()}, snapshots / "1" / "model.safetensors")
            return "the checksum is"
        (fragile / "model.safetensors").touch()
        return "model.safetensors"

    return spoil


def test_weights_that_cannot_be_had_again_are_refused(
    open_server: Open, settings: Settings, spoilt: Callable[[], str], wait_until: WaitUntil
) -> None:
    with open_server(settings) as server:
        update(server.url, "1")
        named = spoilt()
        break_it(server.url)
        wait_until(lambda: status(server.url) == "dead")
        for _ in range(2):  # a request does not load the model anew behind the restart's back
            answer = httpx.post(server.url + "/v1/completions", json=ASKED)
            assert answer.status_code == 503 and named in answer.json()["error"]["message"]
        assert status(server.url) == "dead"


@pytest.fixture
def _two_restarts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(restart, "MOST_RESTARTS", 2)
    yield


@pytest.mark.usefixtures("_two_restarts")
def test_an_engine_that_stops_again_and_again_stays_dead(
    open_server: Open, settings: Settings, wait_until: WaitUntil
) -> None:
    with open_server(settings) as server:
        for number in range(2):
            complete(server.url)
            break_it(server.url)
            wait_until(lambda: status(server.url) == "ok")
            assert server.model("m").num_restarts == number + 1
        break_it(server.url)
        wait_until(lambda: status(server.url) == "dead")
        assert "has stopped" in httpx.post(server.url + "/v1/completions", json=ASKED).text


def test_restarts_far_apart_never_end() -> None:
    restarts = restart.Restarts()
    assert all(
        restarts.is_due(150.0 * number) or restarts.is_due(150.0 * number + 20) for number in range(50)
    )
