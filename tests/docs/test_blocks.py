"""The blocks of the README, the quickstart and six pages run, as they stand, against a real server."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from warm_python import warm_python

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = [
    pytest.param(page, language, code, id=f"{page}-{number}")
    for page in (
        "README.md",
        "docs/quickstart.md",
        "docs/questions.md",
        "docs/sessions.md",
        "docs/agents.md",
        "docs/verify.md",
        "docs/batches.md",
        "docs/inspector.md",
    )
    for number, (language, code) in enumerate(
        re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    )
]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """`myserve serve`, as the README starts it, but on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    server = subprocess.Popen([*warm_python(), "-m", "myserve", "serve", "--port", str(free)])
    try:
        wait_until_healthy(server, free)
        yield free
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0


def wait_until_healthy(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended before it was ready"
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError("the server was not ready within a minute")


def test_the_readme_shows_both_commands_and_both_installs() -> None:
    for words in ("make demo", "make test", "pip install myserve ", "pip install 'myserve[server]'"):
        assert words in README
    assert len(BLOCKS) >= 8


@pytest.mark.parametrize(("page", "language", "code"), BLOCKS)
def test_a_block_runs(page: str, language: str, code: str, port: int, tmp_path: Path) -> None:
    """The inspector's writes a file, and others look into the repository."""
    code = code.replace("localhost:8000", f"localhost:{port}")
    command = (
        [*warm_python(), "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    )
    cwd = tmp_path if page == "docs/inspector.md" else ROOT
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env=os.environ.copy()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or "print" not in code
    assert "error" not in done.stdout.lower()
