"""Mixed requests have equal bits alone, at once, staggered and after a restart; and have not without exactness."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.mixed.hybrids import WAYS, ways_with
from benchmarks.mixed.passes import Report, compare_all, ways_of_threads
from benchmarks.mixed.requests import ECHO, KINDS, MixedRequest, mixed_requests
from benchmarks.mixed.server import Server, serving
from conftest import VOCAB_SIZE
from myserve.bench.load import BenchError
from myserve.embedded import embedded_model_path
from runs import thorough


def compare(model: Path, *, threads: list[int], options: list[str], kept: Path | None = None) -> Report:
    def requests(server: Server) -> list[MixedRequest]:
        return mixed_requests(server.model, count=len(KINDS) + 1, vocab_size=VOCAB_SIZE, longest=90)

    return asyncio.run(
        compare_all(
            model,
            requests,
            ways=ways_of_threads(threads),
            options=["--dtype", "float32", *options],
            seed=0,
            kept=kept,
        )
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", [thorough("odd_gemma3"), thorough("qwen3_moe")])
def test_all_passes_are_equal(arch: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A window and GeGLU of odd width; experts. `python -m benchmarks.mixed MODEL` does it to any model."""
    kept = tmp_path / "answers.json"
    report = compare(tiny_model(arch), threads=[3], options=[], kept=kept)
    assert report.differences == []
    assert report.compared == 4 * (len(KINDS) + 1)
    assert len(json.loads(kept.read_text())) == len(KINDS) + 1


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_control_without_exactness_they_are_not(tiny_model: Callable[[str], Path]) -> None:
    report = compare(tiny_model("odd_gemma3"), threads=[3], options=["--exact", "off"])
    assert report.differences and all("choice" in words for words in report.differences)


def test_a_server_that_does_not_start_says_why() -> None:
    """It says so and is gone within a tenth of a second: its words had been read before it spoke, and not after."""
    for _ in range(3):
        with (
            pytest.raises(BenchError, match=r"ended with status 1 before it was ready: .*exact=off: without"),
            serving(embedded_model_path(), ["--speculation", "4", "--exact", "off"]),
        ):
            pass


def test_a_server_that_is_killed_under_its_requests_is_a_sentence() -> None:
    with (
        pytest.raises(BenchError, match="was killed by SIGKILL"),
        serving(embedded_model_path(), ["--force-echo"]) as server,
    ):
        for process in psutil.Process().children():
            if server.url.rpartition(":")[2] in {str(c.laddr.port) for c in process.net_connections()}:
                process.kill()
        urllib.request.urlopen(server.url + "/version", timeout=10)


def test_control_requests_get_no_drafts_where_a_server_would_refuse_them() -> None:
    assert ways_with(["--page-size", "8"]) == list(WAYS)
    for words in (["--exact", "off"], ["--exact=off"]):
        assert [way.name for way in ways_with(words)] == ["2 threads", "in pieces", "preempted"]


def test_every_kind_is_asked_for_and_a_seed_gives_the_same() -> None:
    one, other = (mixed_requests("m", count=60, seed=5, vocab_size=500) for _ in range(2))
    assert one == other
    assert {request.kind for request in one} == {*KINDS, ECHO}
    assert {request.path for request in one} == {"/v1/completions", "/v1/chat/completions"}
