"""Every route of the server is sorted: it draws, it reads, or it changes the server and wants an admin key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.server.app import create_app
from myserve.server.edge.access import ADMIN, OPEN
from myserve.server.settings import Settings
from myserve.wire.dialects.paths import ADMIN_PATHS, TINKER, TINKER_TRAINING

DRAWS = {"/generate", "/inference/v1/generate", "/tokenize", "/detokenize", "/v1/waterfall"}
DRAWS |= {"/v1/decisions", "/v1/systemone"}
DRAWS |= {f"{root}/v1/{kind}" for root in ("", "/inference") for kind in ("completions", "chat/completions")}
# a response that is kept is its owner's alone, who may delete it
RESPONSES = "/v1/responses"
DRAWS |= {
    RESPONSES,
    f"{RESPONSES}/input_tokens",
    f"{RESPONSES}/{{response_id}}",
    f"{RESPONSES}/{{response_id}}/cancel",
}
DRAWS |= {"/v1/sessions/{session_id}"}  # each key's own
DRAWS |= {"/v1/messages", "/v1/messages/count_tokens"}
# files and batches are their owner's alone
DRAWS |= {"/v1/files", "/v1/files/{file_id}", "/v1/batches", "/v1/batches/{batch_id}/cancel"}
# Tinker's: names of sessions, draws and their promises; training is refused to everyone
DRAWS |= {
    f"{TINKER}/{name}"
    for name in (
        *("client/config", "client/dynamic_config", "create_session", "session_heartbeat", "telemetry"),
        *("create_sampling_session", "join_sampling_session", "sessions/{session_id}/finish"),
        *("asample", "retrieve_future", "cancel_future"),
    )
} | set(TINKER_TRAINING)


def routes() -> list[tuple[str, str]]:
    app = create_app(Settings(models={"m": "x"}, force_echo=True))
    paths: dict[str, Any] = app.openapi()["paths"]
    found = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    assert len(found) > 60
    return found


def test_what_is_no_read_and_no_draw_wants_an_admin_key() -> None:
    changing = [(method, path) for method, path in routes() if method not in ("GET", "HEAD")]
    unsorted = [
        (method, path)
        for method, path in changing
        if path not in DRAWS and path not in ADMIN_PATHS and (method, path) not in ADMIN
    ]
    assert unsorted == []
    assert not (DRAWS & ADMIN_PATHS) and not (OPEN & ADMIN_PATHS)


def test_every_admin_path_but_those_of_the_future_is_a_route() -> None:
    assert ADMIN_PATHS - {path for _, path in routes()} == set()


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    for name in ("user", "admin"):
        (tmp_path / name).write_text(f"sk-{name} {name}\n")
    return {"api_keys_file": str(tmp_path / "user"), "admin_keys_file": str(tmp_path / "admin")}


def test_a_user_s_key_changes_nothing(keys: dict[str, str], open_server: Any) -> None:
    with open_server(Settings(models={"m": "x"}, force_echo=True, **keys)) as server:
        for method, path in routes():
            if path not in ADMIN_PATHS:
                continue

            def status(key: str, method: str = method, path: str = path) -> int:
                headers = {"authorization": f"Bearer {key}"} if key else {}
                return httpx.request(method, server.url + path, json={}, headers=headers).status_code

            assert (status(""), status("sk-user")) == (401, 403), (method, path)
            assert status("sk-admin") not in (401, 403, 500), (method, path)
