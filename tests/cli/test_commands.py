"""The commands, as processes, on a real server; and what each says when something is missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def myserve(*args: str, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "myserve", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200", **env},
    )


@pytest.fixture(scope="module")
def served(tiny_model: Callable[[str], Path]) -> Iterator[str]:
    """`myserve serve` on any free port; its first line says which."""
    command = [sys.executable, "-m", "myserve", "serve", str(tiny_model("qwen3")), "--port", "0"]
    command += ["--served-model-name", "tiny", "--max-model-len", "256", "--dtype", "float32"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    first = server.stderr.readline()
    assert "myserve" in first and "tiny" in first
    url = first.split()[-1]
    yield url
    server.terminate()
    server.stderr.close()
    assert server.wait(timeout=30) in (0, -15)  # uvicorn ends cleanly, then hands the signal on


def test_serve_takes_its_options_to_the_engine(served):
    with urllib.request.urlopen(served + "/v1/models") as answer:
        (model,) = json.load(answer)["data"]
    assert model["id"] == "tiny"
    body = json.dumps({"model": "tiny", "prompt": [1] * 250, "max_tokens": 50}).encode()
    request = urllib.request.Request(served + "/v1/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:  # longer than --max-model-len
        urllib.request.urlopen(request)
    assert json.load(caught.value)["error"]["code"] == "context_length_exceeded"


def test_chat_streams_one_answer(served):
    options = ("--url", served, "--seed", "7", "--max-tokens", "8")
    plain = myserve("chat", "Hello", *options)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip()
    assert myserve("chat", *options, stdin="Hello\n").stdout == plain.stdout
    # no colour where no terminal is
    assert myserve("chat", "Hello", *options, "--probs").stdout == plain.stdout
    coloured = myserve("chat", "Hello", *options, "--probs", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[" in coloured.stdout


def test_sample_writes_every_sample_in_the_prompts_order_and_goes_on_from_a_journal(served, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "Hello"}\n\n{"messages": [{"role": "user", "content": "Hello"}]}\n{"prompt_token_ids": [5, 6]}\n'
    )
    output, journal = tmp_path / "out.jsonl", tmp_path / "journal.jsonl"
    command = [
        "sample",
        str(prompts),
        str(output),
        "--url",
        served,
        "-n",
        "2",
        "--max-tokens",
        "5",
        "--logprobs",
    ]
    command += ["--seed", "7", "--journal", str(journal), "--concurrency", "3"]
    done = myserve(*command)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["prompt_index"], line.get("index", 0)) for line in lines] == [
        (prompt, index) for prompt in range(3) for index in range(2)
    ]
    assert all(len(line["inference_logprobs"]) == line["completion_len"] for line in lines)
    assert (
        lines[0]["full_tokens"][: lines[0]["prompt_len"]] == lines[2]["full_tokens"][: lines[2]["prompt_len"]]
    )
    assert lines[0]["text"] != lines[2]["text"]  # the same prompt twice: samples of their own
    first = output.read_text()
    again = myserve(*command)
    assert "0 samples" in again.stderr  # all of them were in the journal
    assert output.read_text() == first


def test_sample_says_which_prompts_failed_and_why(served, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [5]}\n{"prompt_token_ids": [999999]}\n')
    done = myserve("sample", str(prompts), "-", "--url", served, "--max-tokens", "3")
    good, bad = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1
    assert good["completion_len"] >= 1
    assert "HTTP 400" in bad["error"] and "999999" in bad["error"]


@pytest.mark.parametrize(
    ("line", "words"), [("hello", "line 1: not JSON"), ('{"text": "x"}', "line 1: needs prompt, messages or")]
)
def test_sample_names_a_bad_line(tmp_path, line, words):
    (tmp_path / "in.jsonl").write_text(line)
    done = myserve("sample", str(tmp_path / "in.jsonl"), "-", "--model", "m", "--url", "http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_is_not_there_is_one_line():
    done = myserve("chat", "Hello", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "no answer from http://127.0.0.1:9" in done.stderr and "myserve serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = myserve("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "cannot listen on 127.0.0.1" in done.stderr and "--port" in done.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--dtype", "fp16"), ("--exact", "maybe"), ("--max-num-seqs", "0")]
)
def test_a_wrong_setting_is_named(option, value):
    done = myserve("serve", "--port", "0", option, value)
    assert done.returncode == 1
    assert value in done.stderr and "Traceback" not in done.stderr


def test_without_torch_serving_says_what_to_install():
    """A stand-in for the base install: torch and its friends cannot be found."""
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "fastapi", "numba"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from myserve.cli import app
app(["serve", "--port", "0"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install 'myserve[server]'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["chat", "sample", "serve"])
def test_help_costs_no_torch(command):
    program = f"import sys; from myserve.cli import app; app([{command!r}, '--help'], standalone_mode=False)"
    program += "; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
