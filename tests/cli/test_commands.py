"""The commands, as processes, on a real server; and what each says when something is missing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from warm_python import warm_python


def myserve(*args: str, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*warm_python(), "-m", "myserve", *args],
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
    command = [*warm_python(), "-m", "myserve", "serve", str(tiny_model("qwen3")), "--port", "0"]
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


def test_a_chat_in_a_pipe_is_its_answer_alone_and_goes_on_from_a_file(served, tmp_path):
    session = tmp_path / "talk.json"
    options = ("--url", served, "--seed", "7", "--max-tokens", "8", "--session", str(session))
    first = myserve("chat", *options, "--system", "Be brief", stdin="Hello\n")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.strip()
    second = myserve("chat", "--url", served, "--session", str(session), stdin="And now?\n")
    kept = json.loads(session.read_text())
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"] * 2
    said = [
        re.sub("\r\n?", "\n", message["content"]) + "\n" for message in kept["messages"]
    ]  # as text mode reads
    assert (first.stdout, second.stdout) == (said[1], said[3])
    body = {"model": "tiny", "messages": [{"role": "system", "content": "Be brief"}, *kept["messages"][:3]]}
    request = urllib.request.Request(
        served + "/v1/chat/completions",
        json.dumps(body | {"seed": 7, "max_tokens": 8}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == kept["messages"][3]["content"]
    nothing = myserve("chat", *options, stdin=" \n")
    assert (nothing.returncode, nothing.stdout) == (1, "") and "stdin is empty" in nothing.stderr
    session.write_text("{}")
    refused = myserve("chat", "Hello", *options)
    assert refused.returncode == 1 and "no session of a chat" in refused.stderr


def test_a_chat_in_a_terminal(served, tmp_path):
    """Typed into a pseudo-terminal, as a user does."""
    session = tmp_path / "talk.json"
    typed = [
        "/max_tokens 6",
        "/seed 3",
        '"""',
        "two",
        'lines"""',
        "/retry",
        "/sed 4",
        "Hello",
        "/undo",
        "/probs on",
        "one more \\",
        "line",
        "/alternatives",
        f"/save {session}",
        "/exit",
    ]
    command = [sys.executable, "-m", "myserve", "chat", "--url", served]
    leader, follower = os.openpty()
    with subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        close_fds=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"},
    ) as process:
        os.close(follower)
        os.write(leader, "".join(line + "\n" for line in typed).encode())
        seen = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
        assert process.wait(timeout=30) == 0
    os.close(leader)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode("utf-8", "replace"))
    kept = json.loads(session.read_text())
    assert [m["content"] for m in kept["messages"] if m["role"] == "user"] == [
        "two\nlines",
        "one more \nline",
    ]
    assert kept["options"] == {"max_tokens": 6, "seed": 4}
    assert "there is no command /sed" in shown and "taken back: Hello" in shown
    assert "seed 4" in shown and "token probability" not in shown
    # six tokens, each with its probability and others
    assert len(re.findall(r"^'.*% ", shown, re.MULTILINE)) >= 5


def test_sample_answers_a_batch_in_order_and_goes_on_where_it_was_killed(served, tmp_path):
    lines = [
        {"custom_id": f"line {at}", "url": "/v1/completions", "body": body | {"model": "tiny", "seed": at}}
        for at, body in enumerate(
            [{"prompt": "x", "max_tokens": 200, "ignore_eos": True}] * 12 + [{"prompt": 5}]
        )
    ]
    lines[1] |= {"url": "/v1/responses", "body": {"model": "tiny", "input": "hi", "max_output_tokens": 4}}
    batch, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    batch.write_text("\n".join(map(json.dumps, lines)))
    journal = Path(f"{output}.journal")
    command = ["sample", str(batch), str(output), "--url", served, "--concurrency", "1"]
    with subprocess.Popen([*warm_python(), "-m", "myserve", *command]) as killed:
        while not journal.exists() or len(journal.read_bytes().splitlines()) < 4:
            assert killed.poll() is None
            time.sleep(0.005)
        killed.kill()
    done = myserve(*command)
    asked = int(re.findall(r"(\d+) asked", done.stderr)[0])
    assert done.returncode == 1 and "1 failed" in done.stderr
    assert 1 <= asked <= 10 and not journal.exists()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"line {at}" for at in range(13)]
    assert [answer["response"]["status_code"] for answer in answers] == [200] * 12 + [400]
    assert answers[1]["response"]["body"]["object"] == "response"
    assert answers[12]["response"]["body"]["error"]["param"] == "prompt"
    wrong = myserve(*command, "--max-tokens", "5")
    assert wrong.returncode == 1 and "--max-tokens: the lines of a batch say that themselves" in wrong.stderr


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
