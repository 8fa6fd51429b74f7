"""`myserve serve` takes every declared option, from wherever it comes, and starts on addresses of both families."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import typer

from gguf_files import write_gguf
from myserve.cli import app
from myserve.embedded import embedded_model_path
from myserve.server.settings import OPTIONS
from runs import thorough
from warm_python import warm_python

has_ipv6 = socket.has_ipv6
try:
    socket.create_server(("::1", 0), family=socket.AF_INET6).close()
except OSError:
    has_ipv6 = False


def myserve(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*warm_python(), "-m", "myserve", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200", **env},
    )


@contextmanager
def serving(*args: str, **env: str) -> Iterator[str]:
    """An echo on a free port; the URL that its first line names."""
    command = [*warm_python(), "-m", "myserve", "serve", "--port", "0", "--force-echo", *args]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
    assert server.stderr is not None
    try:
        first = server.stderr.readline()
        assert "http" in first, first + server.stderr.read()
        yield first.split()[-1]
    finally:
        server.terminate()
        server.stderr.close()
        server.wait(timeout=30)


def test_a_server_that_the_system_ends_says_where_it_was() -> None:
    """As a fault in compiled code would make it. (A process of its own: it is sent a signal.)"""
    command = [sys.executable, "-m", "myserve", "serve", "--port", "0", "--force-echo"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        server.stderr.readline()
        server.send_signal(signal.SIGSEGV)
        assert "Fatal Python error: Segmentation fault" in server.stderr.read()


def names(url: str) -> list[str]:
    with urllib.request.urlopen(url + "/v1/models") as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def test_the_command_has_every_declared_option() -> None:
    command: Any = typer.main.get_command(app)
    flags = {flag for param in command.get_command(None, "serve").params for flag in param.opts}
    assert {declared.flag for declared in OPTIONS.values() if declared.name != "model"} <= flags
    assert {"--config", "--cors-origin", "--no-prefix-caching"} <= flags | {
        flag for param in command.get_command(None, "serve").params for flag in param.secondary_opts
    }


def test_the_help_is_grouped_and_says_the_truth_about_exact() -> None:
    text = myserve("serve", "--help").stdout
    assert all(declared.group in text for declared in OPTIONS.values())
    assert "slower" in re.split(r"--exact", text)[1][:400] and "last per cent" not in text


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    done = myserve("--version")
    assert (done.returncode, done.stdout) == (0, f"myserve {version('myserve')}\n")


def test_file_environment_and_command_line_together(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: no/such/one\nserved-model-name: [file]\nstrict: true\n")
    with serving("--config", str(file)) as url:
        assert names(url) == ["file"]
    with serving("--config", str(file), MYSERVE_SERVED_MODEL_NAME="env") as url:
        assert names(url) == ["env"]
    with serving("--config", str(file), "--served-model-name", "a", "--served-model-name", "b") as url:
        assert names(url) == ["a", "b"]


@pytest.mark.skipif(not has_ipv6, reason="this machine has no IPv6")
@pytest.mark.parametrize(
    ("host", "asked"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"]), ("localhost", [])]
)
def test_addresses_of_both_families(host: str, asked: list[str]) -> None:
    with serving("m", "--host", host) as url:
        port = url.rpartition(":")[2]
        assert names(url) == ["m"]
        for address in asked:
            assert names(f"http://{address}:{port}") == ["m"]


def test_an_address_that_is_none_is_said_in_a_line() -> None:
    done = myserve("serve", "--host", "no.such.host.invalid", "--port", "0")
    assert done.returncode == 1 and "cannot listen on no.such.host.invalid:0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("level", "shown"), [thorough("warning", True), ("error", False)])
def test_a_start_says_what_it_does(level: str, shown: bool) -> None:
    command = [
        sys.executable,
        "-m",
        "myserve",
        "serve",
        "--port",
        "0",
        "--log-level",
        level,
        "--log-format",
        "json",
        "--self-test",
        "always",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = server.stderr.readline().split()[-1]
    try:
        while not is_ready(url):
            assert server.poll() is None
            time.sleep(0.1)
    finally:
        server.terminate()
    logged = [
        json.loads(line) for line in server.communicate(timeout=60)[1].splitlines() if line.startswith("{")
    ]
    messages = [line["message"] for line in logged if line["logger"] == "myserve.start"]
    wanted = ("reading the weights of", "packing the weights", "checking that", "kernels")
    assert [any(word in message for message in messages) for word in wanted] == [shown] * 4


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/ready") as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def test_a_gguf_file_is_served_by_its_own_name_and_a_torn_one_is_a_sentence(tmp_path: Path) -> None:
    file = write_gguf(embedded_model_path(), tmp_path / "Small-Q8_0.gguf", gguf.GGMLQuantizationType.Q8_0)
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(file.read_bytes()[:-100_000])
    failed = myserve("serve", str(torn), "--port", "0")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith(
        "error: torn did not load: torn.gguf is torn or no GGUF file: "
    )
    with serving(str(file), "--no-force-echo", "--max-model-len", "128") as url:
        assert names(url) == ["Small-Q8_0"]
        said = [{"role": "user", "content": "Solve: 2+2="}]
        asked = {"model": "Small-Q8_0", "messages": said, "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            url + "/v1/chat/completions",
            json.dumps(asked).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"]
