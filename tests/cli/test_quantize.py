"""`myserve quantize` as a process, and a server on what it wrote: `/version` says what runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from conftest import make_tiny_model
from warm_python import warm_python

command = importlib.import_module("myserve.cli.quantize")  # the package has a command of this name


def quantize(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*warm_python(), "-m", "myserve", "quantize", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_writes_a_checkpoint_that_a_server_serves(tmp_path: Path) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model")
    done = quantize(model, tmp_path / "int8")
    assert done.returncode == 0, done.stderr
    assert f"serve it with: myserve serve {tmp_path / 'int8'}" in done.stderr
    names = {path.name for path in (tmp_path / "int8").iterdir()}
    assert names == {path.name for path in model.iterdir()}
    serve = [
        *warm_python(),
        "-m",
        "myserve",
        "serve",
        str(tmp_path / "int8"),
        "--port",
        "0",
        "--served-model-name",
        "tiny",
    ]
    server = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = server.stderr.readline().split()[-1]
        body = json.dumps({"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3}).encode()
        request = urllib.request.Request(url + "/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] > 0
        with urllib.request.urlopen(url + "/version") as answer:
            told = json.load(answer)["quantization"]["tiny"]
        assert told["method"] == "int8" and told["layers"] == 15 and told["unquantized"] == []
    finally:
        server.terminate()
        server.stderr.close()
        server.wait(timeout=30)


def test_what_cannot_be_written_is_one_line(
    tmp_path: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    model_folder = tiny_model("qwen3")
    capsys.readouterr()
    for model, out, reason in (
        (model_folder, tmp_path / "there", "exists already"),
        (tmp_path / "nowhere", tmp_path / "out", "is no folder"),
        (tmp_path / "there", tmp_path / "out", "is no model"),
    ):
        with pytest.raises(typer.Exit) as ended:
            command.quantize(str(model), out)
        said = capsys.readouterr().err
        assert ended.value.exit_code == 1 and said.startswith("error: ") and reason in said
        assert len(said.splitlines()) == 1 and not (tmp_path / "out").exists()
