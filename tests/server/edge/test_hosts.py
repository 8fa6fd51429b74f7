"""A page that rebinds its name to our address is refused: the names that are ours are a closed list."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from myserve.server.edge.hosts import AllowedHosts, host_of
from myserve.server.settings import Settings

Open = Callable[[Settings], AbstractContextManager[Any]]


def status(url: str, method: str = "GET", path: str = "/v1/models", **headers: str) -> int:
    """httpx would write a Host of its own beside ours."""
    address = url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


@pytest.fixture(scope="module")
def url(open_server: Open) -> Any:
    with open_server(
        Settings(models={"m": "x"}, force_echo=True, allowed_hosts=("api.example.com", ".in"))
    ) as own:
        yield own.url


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:9", "10.1.2.3:80", "api.example.com:443", "a.b.in",
     "x.localhost", socket.gethostname(), "api.example.com."],
)  # fmt: skip
def test_our_names_and_all_addresses_are_answered(url: str, host: str) -> None:
    assert status(url, host=host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "example.com",
     "evil-api.example.com", "xin", "", "[", "[::1", "a@localhost", "localhost/x", "localhost:port"],
)  # fmt: skip
def test_other_names_are_refused_on_every_route_whatever_the_page_says(url: str, host: str) -> None:
    for path in ("/v1/models", "/", "/health", "/metrics"):
        assert status(url, path=path, host=host) in (400, 403)
    assert status(url, "POST", "/v1/weights", host=host, origin=f"http://{host}") in (400, 403)


def test_a_star_lets_every_name_in(open_server: Open) -> None:
    with open_server(Settings(models={"m": "x"}, force_echo=True, allowed_hosts=("*",))) as own:
        assert status(own.url, host="evil.example") == 200


def test_http_1_0_is_no_browsers_and_is_answered_whatever_its_host(url: str) -> None:
    """nginx speaks it by default, with its own name for us as the Host."""
    for protocol, expected in ((b"1.0", b"200"), (b"1.1", b"403")):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as raw:
            raw.sendall(
                b"GET /v1/models HTTP/" + protocol + b"\r\nhost: upstream\r\nconnection: close\r\n\r\n"
            )
            assert raw.recv(1 << 16).split()[1] == expected


def test_the_name_that_it_listens_on_is_its_own() -> None:
    assert AllowedHosts(listening_on="gpu-7.lab").allows("GPU-7.lab:8000")
    assert not AllowedHosts().allows("gpu-7.lab:8000")


def test_in_memory_the_name_that_was_asked_is_the_one_that_was_reached() -> None:
    assert AllowedHosts().allows("testserver", "testserver") and not AllowedHosts().allows(
        "testserver", "127.0.0.1"
    )


@pytest.mark.parametrize("header", ["a:b", "a:99999", "u@h", "h/p", "h?q", "h#f", "]", "", ":80"])
def test_what_is_no_host_is_none(header: str) -> None:
    assert host_of(header) is None


@pytest.mark.parametrize(
    "origin", ["http://[", "http://]", "[", "://", "null", "http://evil.example", "http://localhost"]
)
def test_an_origin_that_is_not_the_hosts_is_refused_and_never_a_crash(url: str, origin: str) -> None:
    assert status(url, host="localhost:1", origin=origin) == 403
    assert status(url, host="localhost:1", origin="http://localhost:1") == 200
