"""Sessions over HTTP: each key's are its own, bounded, deleted on request, forgotten after a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from myserve.server.answers import size
from myserve.server.sessions.store import Sessions
from myserve.server.settings import Settings


@pytest.fixture(scope="module")
def echo(
    tmp_path_factory: pytest.TempPathFactory, open_server: Callable[[Settings], AbstractContextManager[Any]]
) -> Iterator[Any]:
    """A server without a model, for alice and bob."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("sk-alice alice\nsk-bob bob\n")
    with open_server(
        Settings(models={"echo": "echo"}, force_echo=True, api_keys_file=str(keys), cors_origins=("*",))
    ) as running:
        yield running


@pytest.fixture
def clock(echo: Any) -> list[float]:
    """The seconds of sessions of this test's own: 100 and what it adds to them; they have 30,000 bytes."""
    now = [100.0]
    echo.app.state.sessions = Sessions(timeout=60, most_bytes=30_000, now=lambda: now[0])
    return now


def key(owner: str, session: str | None = None) -> dict[str, str]:
    headers = {"Authorization": f"Bearer sk-{owner}"}
    return headers if session is None else headers | {"X-Session-ID": session}


def say(echo: Any, prompt: str, headers: dict[str, str]) -> Any:
    body = {"model": "echo", "prompt": prompt, "max_tokens": 4096, "return_token_ids": True}
    answered = httpx.post(f"{echo.url}/v1/completions", json=body, headers=headers)
    assert answered.status_code == 200, answered.text
    return answered.json()["choices"][0]


def get(echo: Any, name: str, owner: str = "alice", **query: Any) -> httpx.Response:
    return httpx.get(f"{echo.url}/v1/sessions/{name}", headers=key(owner), params=query)


@pytest.mark.usefixtures("clock")
def test_a_key_never_sees_anothers(echo: Any) -> None:
    say(echo, "secret", key("alice", "one"))
    assert get(echo, "one").json()["num_turns"] == 1
    for name in ("one", "none"):
        refused = get(echo, name, "bob")
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "session_not_found"
    gone = httpx.delete(f"{echo.url}/v1/sessions/one", headers=key("bob"))
    assert gone.status_code == 404 and gone.json()["error"]["type"] == "not_found_error"
    # bob's of the same name is another one, which goes on from nothing of alice's
    assert say(echo, "secret", key("bob", "one"))["session"]["turn"] == 0
    assert get(echo, "one").json()["num_turns"] == 1
    assert httpx.get(f"{echo.url}/v1/sessions/one").status_code == 401


@pytest.mark.usefixtures("clock")
def test_a_deleted_one_is_gone(echo: Any) -> None:
    name = "run 7/step 1?x"
    assert say(echo, "a", key("alice", "run")).get("session")["id"] == "run"
    deleted = httpx.delete(f"{echo.url}/v1/sessions/run", headers=key("alice"))
    assert deleted.json() == {"id": "run", "object": "session.deleted", "deleted": True}
    assert get(echo, "run").status_code == 404
    assert say(echo, "a", key("alice", "run"))["session"]["turn"] == 0
    # ids are any printable text of ASCII
    say(echo, "a", key("alice", name))
    assert get(echo, quote(name, safe="")).json()["id"] == name
    body = {"model": "echo", "prompt": "a"}
    for odd in (b"x" * 257, "é".encode()):
        headers = {k.encode(): v.encode() for k, v in key("alice").items()} | {b"X-Session-ID": odd}
        refused = httpx.post(f"{echo.url}/v1/completions", json=body, headers=headers)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "session_id"


def test_an_unused_one_is_forgotten(echo: Any, clock: list[float]) -> None:
    say(echo, "a", key("alice", "s"))
    assert get(echo, "s").json()["expires"] == 160
    clock[0] += 59
    say(echo, "b", key("alice", "s"))
    clock[0] += 59
    assert get(echo, "s").json()["num_turns"] == 2
    clock[0] += 2
    assert get(echo, "s").status_code == 404


@pytest.mark.usefixtures("clock")
def test_bytes_are_bounded_and_the_owner_who_has_most_makes_room(echo: Any) -> None:
    say(echo, "b", key("bob", "small"))
    for number in range(3):
        say(echo, "x" * 250, key("alice", f"s{number}"))
    assert [get(echo, f"s{number}").status_code for number in range(3)] == [404, 404, 200]
    assert get(echo, "small", "bob").status_code == 200
    # alone, one that is full keeps no more, and says so
    full = say(echo, "x" * 900, key("alice", "s2"))["session"]
    assert full["turn"] is None
    body = get(echo, "s2").json()
    assert (body["num_turns"], body["not_kept"]) == (1, 1)


@pytest.mark.usefixtures("clock")
def test_a_large_one_is_given_trajectory_by_trajectory(echo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("aa", "bbb"):
        say(echo, text, key("alice", "s"))
    whole = get(echo, "s").json()
    assert [one["index"] for one in whole["trajectories"]] == [0, 1]
    assert get(echo, "s", trajectory=-1).json()["trajectories"] == whole["trajectories"][1:]
    for odd in ("2", "-3", "x"):
        assert get(echo, "s", trajectory=odd).json()["error"]["param"] == "trajectory"
    monkeypatch.setattr(size, "MAX_ANSWER_BYTES", 64 * 9 + 2 * 512)
    refused = get(echo, "s")
    assert refused.status_code == 400 and "?trajectory=" in refused.json()["error"]["message"]
    assert get(echo, "s", trajectory=0).status_code == 200


@pytest.mark.parametrize(
    "header", ["X-Session-ID", "X-Session-Affinity", "x-claude-code-session-id", "session-id", "session_id"]
)
@pytest.mark.usefixtures("clock")
def test_the_names_that_clients_use(echo: Any, header: str) -> None:
    assert say(echo, "a", key("alice") | {header: "mine"})["session"]["id"] == "mine"
    assert "session" not in say(echo, "a", key("alice") | {"X-User-Id": "mine"})


def test_without_memory_for_them_there_are_none(echo: Any) -> None:
    echo.app.state.sessions = Sessions(timeout=60, most_bytes=0)
    assert "session" not in say(echo, "a", key("alice", "s"))
    assert get(echo, "s").status_code == 404


@pytest.mark.usefixtures("clock")
def test_a_page_may_use_them(echo: Any) -> None:
    asks = {
        "Origin": "https://page",
        "Access-Control-Request-Method": "DELETE",
        "Access-Control-Request-Headers": "x-session-id",
    }
    assert httpx.options(f"{echo.url}/v1/sessions/s", headers=asks).status_code == 200
