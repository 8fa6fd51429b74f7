"""What goes wrong with one request, or with the whole process, costs nobody else a token."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder
from warm_python import warm_python

ASKED = {
    "model": "tiny",
    "prompt": [5, 6, 7],
    "max_tokens": 200,
    "seed": 11,
    "ignore_eos": True,
    "return_token_ids": True,
}
BOMBS: list[dict[str, Any]] = [
    {"regex": "((a{1,1000}){1,1000}){1,1000}b"},
    {"regex": "(x+x+)+y" * 50},
    {"regex": "(" * 5000 + "a" + ")" * 5000},
    {"regex": "(?:a?){500}a{500}"},
    {"grammar": "root ::= root root | " + " | ".join(f'"{i}"' for i in range(5000))},
    {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}}},
    {"json_schema": {"type": "array", "items": {"enum": [str(i) * 50 for i in range(20000)]}}},
    {"choice": ["a" * 5000] * 500},
]


def stream(url: str, **fields: Any) -> Iterator[list[int]]:
    """The ids of each chunk, as they come."""
    decoder = SSEDecoder()
    body = ASKED | fields | {"stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
        for part in answer.iter_bytes():
            for event in decoder.feed(part):
                if not event.is_done:
                    yield event.json()["choices"][0]["token_ids"]


def joined(chunks: Iterator[list[int]]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk]


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_a_grammar_that_blows_up_hurts_nobody(server: Any, bomb: dict[str, Any]) -> None:
    alone = joined(stream(server.url))
    beside = stream(server.url)
    begun = next(beside)
    answer = httpx.post(
        server.url + "/v1/completions", json=ASKED | {"max_tokens": 8, "ignore_eos": False} | bomb, timeout=60
    )
    assert answer.status_code in (200, 400)
    assert begun + joined(beside) == alone


def test_a_tokenizer_that_panics_is_one_request_s_error(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic in Rust is no Exception in Python: it passes `except Exception`."""
    codec, encode = server.model("tiny").codec, server.model("tiny").codec.encode

    class PanicException(BaseException):  # pyo3's own name
        pass

    def panic(text: str, **options: Any) -> list[int]:
        if "boom" in text:
            raise PanicException("called `Option::unwrap()` on a `None` value")
        ids: list[int] = encode(text, **options)
        return ids

    monkeypatch.setattr(type(codec), "encode", lambda self, text, **options: panic(text, **options))
    beside = stream(server.url)
    next(beside)
    for prompt in ("boom", "boom " * 1000):  # on the loop, and in the thread for long ones
        answer = httpx.post(server.url + "/v1/completions", json=ASKED | {"prompt": prompt}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert len(joined(beside)) > 100
    assert httpx.post(server.url + "/v1/completions", json=ASKED | {"prompt": "fine"}).status_code == 200


WRITER = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
data = open(sys.argv[1], "rb").read()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) - 1000, len(data) - 1000))
with open(sys.argv[2], "wb") as file:
    file.write(data)
"""


def test_a_snapshot_whose_writer_ran_out_of_room_changes_nothing(
    open_server: Any, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("qwen3")
    (tmp_path / "torn").mkdir()
    paths = [str(folder / "model.safetensors"), str(tmp_path / "torn" / "model.safetensors")]
    writer = subprocess.run(
        [*warm_python(), "-c", WRITER, *paths], capture_output=True, text=True, check=False, timeout=60
    )
    assert "File too large" in writer.stderr and Path(paths[1]).stat().st_size > 1000
    with open_server(Settings(models={"tiny": str(folder)}, weights_dir=str(tmp_path))) as own:
        alone = joined(stream(own.url))
        beside = stream(own.url)
        begun = next(beside)
        answer = httpx.post(own.url + "/v1/weights", json={"path": "torn"}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_snapshot")
        assert begun + joined(beside) == alone
        assert own.model("tiny").engine.weight_version == 0


@contextmanager
def served(model: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`myserve serve` in a process of its own; its first line says where."""
    command = [
        *warm_python(),
        "-m",
        "myserve",
        "serve",
        str(model),
        "--port",
        "0",
        "--served-model-name",
        "tiny",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield process.stderr.readline().split()[-1], process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_after_kill_9_the_same_seeds_give_the_same_answers(tiny_model: Callable[[str], Path]) -> None:
    with served(tiny_model("qwen3")) as (url, process):
        cut = stream(url)
        got = next(cut) + next(cut)
        process.kill()
        with pytest.raises(httpx.TransportError):
            got += joined(cut)
    with served(tiny_model("qwen3")) as (url, _):
        whole = joined(stream(url))
        control = joined(stream(url, seed=12))
    assert len(whole) == ASKED["max_tokens"] and 0 < len(got) < len(whole)
    assert whole[: len(got)] == got and control[: len(got)] != got
