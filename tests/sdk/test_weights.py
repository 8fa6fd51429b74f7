"""New weights asked for by the sampler, on real servers; and what a sample says that lived through them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from conftest import make_tiny_model
from myserve.sdk import DeploymentSampler, WeightUpdateError
from myserve.sdk.sampling.versions import VersionLog
from myserve.server.app import create_app
from myserve.server.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
PROMPT = [1, 67, 281, 5]


@pytest.fixture(scope="module")
def two_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two servers with a weights directory of two snapshots."""
    root = tmp_path_factory.mktemp("weights")
    for seed in range(2):
        make_tiny_model("qwen3", root / str(seed), seed=seed)
        (root / f"step-{7 + seed}").symlink_to(root / str(seed))
    running = [_serve(root) for _ in range(2)]
    yield [url for url, _, _ in running]
    for _, server, thread in running:
        server.should_exit = True
        thread.join()


def _serve(root: Path) -> tuple[str, uvicorn.Server, threading.Thread]:
    app = create_app(Settings(models={"tiny": str(root / "0")}, weights_dir=str(root)))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=2))

    def run() -> None:
        with listener:
            server.run(sockets=[listener])

    thread = threading.Thread(target=run)
    thread.start()
    while set(app.state.models.readiness().values()) != {"ready"}:
        time.sleep(0.02)
    return f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread


def test_all_servers_have_them_and_every_sample_says_so(two_urls: list[str]) -> None:
    async def scene() -> None:
        async with DeploymentSampler(two_urls, "tiny") as sampler:
            options = {"n": 2, "max_tokens": 8, "seed": 3}
            before = await sampler.sample_with_prompt_tokens(PROMPT, **options)
            assert [c.weight_version for c in before] == [0, 0]
            reports = await sampler.update_weights(Path("1"))
            assert [(r["weight_version"], r["identity"]) for r in reports] == [(1, "1")] * 2
            after = await sampler.sample_with_prompt_tokens(PROMPT, **options)
            assert [c.weight_version for c in after] == [1, 1]
            assert [c.full_tokens for c in after] != [c.full_tokens for c in before]
            replicas = await sampler.hot_load("0", reset_prompt_cache=True)
            assert [r["current_snapshot_identity"] for r in replicas] == ["0", "0"]
            again = await sampler.sample_with_prompt_tokens(PROMPT, **options)
            assert [c.full_tokens for c in again] == [c.full_tokens for c in before]
            with pytest.raises(WeightUpdateError, match="not a folder with safetensors") as refused:
                await sampler.update_weights("2")
            assert (refused.value.status, refused.value.url) == (400, two_urls[0])
            with pytest.raises(WeightUpdateError, match="builds on '1'"):
                await sampler.hot_load("1", previous_identity="1")

    asyncio.run(scene())
    with pytest.raises(WeightUpdateError):
        DeploymentSampler(two_urls, "tiny").sync.update_weights("../0")


def test_a_sample_that_lives_through_an_update_has_spans(two_urls: list[str]) -> None:
    async def scene() -> None:
        async with DeploymentSampler(two_urls[0], "tiny") as sampler:
            stream = sampler.stream_tokens(PROMPT, n=1, max_tokens=480, ignore_eos=True)
            await anext(stream)
            rest = asyncio.create_task(_last(stream))
            reports = await sampler.update_weights("1", mode="abort")
            assert reports[0]["num_aborted"] == 1
            assert (await rest) == "abort"
            started = asyncio.Event()
            plan = sampler.plan(PROMPT, {"max_tokens": 480, "ignore_eos": True})
            sampling = asyncio.create_task(sampler.draw(plan, on_delta=lambda _: started.set()))
            await started.wait()
            versions = [(await sampler.update_weights(path, mode="keep"))[0] for path in "01"]
            (sample,) = await sampling
            spans = sample.weight_version_spans
            assert spans is not None and spans[-1]["end"] == sample.completion_len == 480
            assert spans[-1]["weight_version"] == sample.weight_version == versions[-1]["weight_version"]
            assert [span["start"] for span in spans[1:]] == [span["end"] for span in spans[:-1]]

    asyncio.run(scene())


async def _last(stream: object) -> str | None:
    reason = None
    async for delta in stream:  # type: ignore[attr-defined]
        reason = delta.finish_reason or reason
    return reason


def span(start: int, end: int, version: int, **more: bool) -> dict[str, int]:
    return {"start": start, "end": end, "weight_version": version, **more}


def test_a_resumed_sample_adds_up_its_attempts() -> None:
    log = VersionLog()
    log.feed(3, 0)
    log.feed(5, 1)
    log.begin(5)  # cut: its keys and values come anew, by version 1, though version 0 had made some
    log.feed(6, 1)
    log.begin(6)  # and again, when version 2 serves
    log.feed(9, 2)
    log.correct([span(0, 1, 2), span(1, 3, 3)])  # a chunk had tokens of two versions
    assert log.spans() == [
        span(0, 3, 0),
        span(3, 5, 1),
        span(5, 6, 1, recomputed=True),
        span(6, 7, 2, recomputed=True),
        span(7, 9, 3),
    ]


def test_one_version_or_none_has_no_spans() -> None:
    same, unknown = VersionLog(), VersionLog()
    same.feed(3, 4)
    same.begin(2)
    same.feed(5, 4)
    unknown.feed(3, None)
    assert (same.spans(), unknown.spans(), VersionLog().spans()) == (None, None, None)


def test_the_page_runs(two_urls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text().replace("http://localhost:8000", two_urls[0]).replace("my-model", "tiny")
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "python", "python"]
    for language, code in blocks:
        if language == "bash":
            done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
            assert json.loads(done.stdout)["identity"] == "step-7"
        else:
            exec(compile(code, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("sha256:") == 2
