"""Health says what state the models are in, and never waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.server.app import create_app
from myserve.server.settings import Settings

Open = Callable[[Settings], AbstractContextManager[Any]]


def test_a_model_that_can_be_served_is_healthy_and_its_weights_version_is_in_a_header(server: Any) -> None:
    answer = httpx.get(server.url + "/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert '"tiny":0' in answer.headers["myserve-weight-versions"].replace(" ", "")
    assert httpx.get(server.url + "/healthz").status_code == 200
    assert set(httpx.get(server.url + "/ready").json()["models"].values()) == {"ready"}


def test_a_model_that_does_not_load_is_named_for_good(open_server: Open, tmp_path: Path) -> None:
    with open_server(Settings(models={"gone": str(tmp_path / "gone")})) as server:
        answer = httpx.get(server.url + "/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "failed", "models": ["gone"]})
        ready = httpx.get(server.url + "/ready")
        assert (ready.status_code, ready.json()["models"]) == (503, {"gone": "failed"})


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/v1/models/m", "/metrics"])
def test_no_probe_starts_a_load(path: str) -> None:
    app = create_app(Settings(models={"m": "no/such/folder"}))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    assert asyncio.run(ask()).status_code in (200, 503)
    assert app.state.models.readiness() == {"m": "unloaded"}


def test_anthropic_s_clients_get_models_in_their_shape(server: Any) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    page = httpx.get(server.url + "/v1/models", headers=headers, params={"limit": 1}).json()
    ids = [model["id"] for model in httpx.get(server.url + "/v1/models").json()["data"]]
    assert [model["id"] for model in page["data"]] == ids
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[0], ids[-1], False)
    one = httpx.get(server.url + "/v1/models/tiny", headers=headers).json()
    assert one == page["data"][0]
    assert (one["type"], one["display_name"], one["max_input_tokens"]) == ("model", "tiny", 512)
    assert datetime.fromisoformat(one["created_at"]).timestamp() == server.app.state.models.created
    behind = httpx.get(server.url + "/v1/models", headers=headers, params={"after_id": ids[-1]}).json()
    assert behind["data"] == []


def test_a_model_that_is_not_served_is_a_404(server: Any) -> None:
    answer = httpx.get(server.url + "/v1/models/other")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    theirs = httpx.get(server.url + "/v1/models/other", headers={"anthropic-version": "2023-06-01"})
    assert theirs.status_code == 404 and theirs.json()["type"] == "error"
    assert theirs.json()["error"]["type"] == "not_found_error"
