"""The environment's proxies are used, and passed by where `NO_PROXY` says so."""

from __future__ import annotations

import errno
import http.server
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from myserve.sdk import SamplingError
from myserve.sdk.transport.http import describe, proxy_for


class Proxy(http.server.BaseHTTPRequestHandler):
    """A forward proxy that keeps the addresses that it was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        onward = urllib.request.Request(self.path, data=body or None, method=self.command)
        onward.add_header("content-type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(onward, timeout=20) as answer:
            data = answer.read()
            self.send_response(answer.status)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (Proxy,), {"asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.asyncio
async def test_samples_go_through_the_environments_proxy(make_sampler, stub, proxy, no_proxies):
    url, asked = proxy
    no_proxies.setenv("HTTP_PROXY", url)
    (through,) = await make_sampler().sample_with_prompt_tokens([1, 2], seed=7)
    assert asked == [f"{stub.url}/version", f"{stub.url}/inference/v1/completions"]
    no_proxies.setenv("NO_PROXY", "127.0.0.1")
    (around,) = await make_sampler().sample_with_prompt_tokens([1, 2], seed=7)
    assert len(asked) == 2
    assert through.full_tokens == around.full_tokens


@pytest.mark.asyncio
async def test_a_proxy_that_is_not_there_is_a_broken_connection(make_sampler, no_proxies):
    no_proxies.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(SamplingError, match="the connection failed"):
        await make_sampler().sample_with_prompt_tokens([1, 2])


def test_which_proxy_is_taken(no_proxies):
    assert proxy_for("http", "host:80") is None
    no_proxies.setenv("ALL_PROXY", "all.example:3128")
    assert proxy_for("https", "host") == "http://all.example:3128"
    no_proxies.setenv("https_proxy", "http://tls.example:1")
    assert proxy_for("https", "host") == "http://tls.example:1"
    no_proxies.setenv("no_proxy", ".example.com,localhost")
    assert proxy_for("https", "a.example.com:8000") is None
    assert proxy_for("https", "localhost:8000") is None
    assert proxy_for("https", "127.0.0.1:8000") is not None
    no_proxies.setenv("no_proxy", "*")
    assert proxy_for("https", "host") is None


def test_a_proxy_that_cannot_be_spoken_to_is_not_passed_by_in_silence(no_proxies):
    no_proxies.setenv("all_proxy", "socks5://127.0.0.1:1080")
    with pytest.raises(ValueError, match=r"socks5://127\.0\.0\.1:1080' does not speak HTTP.*NO_PROXY"):
        proxy_for("http", "host")


def test_too_many_open_files_says_what_to_do():
    assert "concurrency_controller" in describe(OSError(errno.EMFILE, "Too many open files"))
