"""Keys, admin keys, origins: who is let in, who is not, and that both can change while the server runs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from myserve.errors import RequestError
from myserve.server.app import create_app
from myserve.server.edge.keys import KeyFile
from myserve.server.settings import Settings

OPEN = ("/", "/health", "/healthz", "/ready", "/liveness", "/api/v1/healthz")
PAGE = "https://page.example"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# who may ask\nsk-alice alice\nsk-bob  # bob's\n")
    return file


@pytest.fixture
def locked(
    keys: Path, tmp_path: Path, open_server: Callable[[Settings], AbstractContextManager[Any]]
) -> Iterator[str]:
    """An echo with keys, admin keys and one page that may ask."""
    admins = tmp_path / "admins"
    admins.write_text("sk-admin trainer\n")
    settings = Settings(
        models={"tiny": "no/such/folder"},
        force_echo=True,
        weights_dir=str(tmp_path),
        api_keys_file=str(keys),
        admin_keys_file=str(admins),
        cors_origins=(PAGE,),
    )
    with open_server(settings) as server:
        yield server.url


def status(method: str, url: str, key: str | None = None, **fields: Any) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    # `httpx.request` reads all certificates of the system anew, 30 ms each time
    with httpx.Client(verify=False) as client:
        return client.request(method, url, headers=headers, **fields).status_code


def test_every_route_but_health_wants_a_key(locked: str) -> None:
    paths: dict[str, Any] = httpx.get(
        locked + "/openapi.json", headers={"x-api-key": "sk-alice"}
    ).json()["paths"]  # fmt: skip
    routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    assert len(routes) > 12
    assert status("GET", locked + "/") == 200
    for method, path in [*routes, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/x")]:
        wanted = 200 if path in OPEN else 401
        assert status(method, locked + path) == wanted, path
        assert status(method, locked + path, "sk-carol") == wanted, path
        if path not in OPEN:
            assert status(method, locked + path, "sk-alice") != 401, path


def test_a_refusal_says_what_is_missing(locked: str) -> None:
    answer = httpx.get(locked + "/v1/models")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    for key, found in [("sk-bob", "hi"), ("wrong", None)]:
        client = openai.OpenAI(base_url=locked + "/v1", api_key=key, max_retries=0)
        if found is None:
            with pytest.raises(openai.AuthenticationError, match="a key is needed"):
                client.chat.completions.create(**body)
        else:
            assert client.chat.completions.create(**body).choices[0].message.content == found


def test_weights_want_an_admin_key_which_is_good_for_all_else(locked: str) -> None:
    for path, body in [("/v1/weights", {"path": "1"}), ("/hot_load/v1/models/hot_load", {"identity": "1"})]:
        assert status("POST", locked + path, json=body) == 401
        assert status("POST", locked + path, "sk-alice", json=body) == 403
        assert status("POST", locked + path, "sk-admin", json=body) == 400  # let in; an echo has no weights
        assert status("GET", locked + path, "sk-alice") == 200
    assert status("GET", locked + "/v1/models", "sk-admin") == 200


@pytest.mark.parametrize(("api", "admin", "expected"), [(True, False, 403), (False, True, 401)])
def test_weights_without_one_of_the_files(
    keys: Path, open_server: Any, api: bool, admin: bool, expected: int
) -> None:
    files = {"api_keys_file": str(keys) if api else None, "admin_keys_file": str(keys) if admin else None}
    with open_server(Settings(models={"tiny": "x"}, force_echo=True, **files)) as server:
        key = "sk-alice" if api else "sk-carol"
        assert status("POST", server.url + "/v1/weights", key, json={"path": "1"}) == expected
        assert status("GET", server.url + "/v1/models") == (401 if api else 200)


def test_keys_are_rotated_while_it_runs(locked: str, keys: Path) -> None:
    url = locked + "/v1/models"
    keys.write_text("sk-new alice\n")
    assert (status("GET", url, "sk-new"), status("GET", url, "sk-alice")) == (200, 401)
    keys.write_text("# nobody\n")
    assert status("GET", url, "sk-new") == 200  # a file without keys changes nothing
    keys.unlink()
    assert status("GET", url, "sk-new") == 200
    other = keys.with_name("other")
    other.write_text("sk-third\n")
    other.replace(keys)
    assert (status("GET", url, "sk-third"), status("GET", url, "sk-new")) == (200, 401)


def test_a_file_without_keys_does_not_start_an_open_server(tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    with pytest.raises(RequestError, match="cannot be read"):
        KeyFile(empty)
    empty.write_text("\n# none\n")
    with pytest.raises(RequestError, match="has no keys"):
        create_app(Settings(models={"tiny": "x"}, api_keys_file=str(empty)))


def test_a_page_is_refused_unless_it_is_named(locked: str) -> None:
    """Not answered, and not acted upon either: a page may send a body without asking for leave."""
    url, key = locked + "/v1/models", {"x-api-key": "sk-alice"}
    for origin in ["https://evil.example", "null", PAGE + ":8443", "http://page.example"]:
        answer = httpx.get(url, headers=key | {"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert "access-control-allow-origin" not in answer.headers
    allowed = httpx.get(url, headers=key | {"origin": PAGE})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    own = httpx.get(url, headers=key | {"origin": locked})
    assert own.status_code == 200  # the inspector
    asks = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key",
    }
    leave = httpx.options(url, headers=asks)
    assert (leave.status_code, leave.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "access-control-allow-credentials" not in leave.headers


def test_by_default_no_page_may_ask(server: Any) -> None:
    origin = {"origin": PAGE}
    assert httpx.get(server.url + "/v1/models", headers=origin).status_code == 403
    asks = origin | {"access-control-request-method": "POST"}
    assert httpx.options(server.url + "/v1/completions", headers=asks).status_code == 403


@pytest.mark.parametrize("hidden", [b"", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_request_with_two_ends_is_refused_and_nothing_behind_it_is_read(server: Any, hidden: bytes) -> None:
    """By its length it ends elsewhere than by its chunks: what a proxy takes for a body would be a request here."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden)
        answer = b""
        while part := connection.recv(65536):  # until the server closes
            answer += part
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert b"both Content-Length and Transfer-Encoding" in answer
