"""Kernels are made ready under the eyes of whoever waits, and a second process can compile a part of them."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from myserve.engine.kernels import cache_folder, warm

AFTER = """
import torch
from myserve.engine.kernels.warm import warm
warm(torch.bfloat16, torch.float32)  # as the module run as a command does

from numba.core import event
compiled = []
with event.install_listener("numba:compile", event.RecordingListener()) as seen:
    from myserve import Engine, EngineConfig, SamplingParams
    from myserve.embedded import embedded_model_path
    import asyncio

    async def main():
        engine = Engine.from_pretrained(str(embedded_model_path()), EngineConfig(num_blocks=64))
        stream = engine.submit(engine.tokenizer.encode("Solve: 2+2="), SamplingParams(max_tokens=4, seed=7))
        assert [delta async for delta in stream]
        engine.shutdown()

    asyncio.run(main())
names = {str(what.data["dispatcher"]) for _, what in seen.buffer if what.is_start}
print(len(names), sorted(names))
"""


def test_every_kernel_is_read_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    warm.warm(torch.float32)
    assert cache_folder.is_complete("float32") and cache_folder.is_complete("sampler")
    with caplog.at_level(logging.INFO, "myserve.start"):
        warm.warm(torch.float32)
    assert caplog.records[0].getMessage() == "reading compiled kernels"


def test_of_many_that_start_at_once_one_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines whose kernels are not kept yet, started at once: one compiles, and the others wait for what it keeps."""
    kept: set[str] = set()
    started: list[int] = []
    at_work: list[int] = []

    def compile_beside() -> None:
        started.append(1)

    def make() -> None:
        at_work.append(threading.get_ident())
        time.sleep(0.01)
        assert at_work.pop() == threading.get_ident(), "two compiled at once"

    all_began = threading.Barrier(8)

    def is_complete(types: str) -> bool:
        if types == "float32":
            all_began.wait(timeout=60)
        return types in kept

    monkeypatch.setattr(cache_folder, "is_complete", is_complete)
    monkeypatch.setattr(cache_folder, "mark_complete", kept.add)
    monkeypatch.setattr(warm, "_compile_sampler_beside", compile_beside)
    monkeypatch.setattr(warm, "_work", lambda *_, **__: [("GEMM", make), ("the sampler", make)])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: warm.warm(torch.float32), range(8)))
    assert len(started) == 1


def test_a_process_waits_for_the_one_that_compiles() -> None:
    """The lock is the folder's, so that it holds between processes, and is given back by one that is killed."""
    held = "\n".join(
        (
            "from myserve.engine.kernels.cache_folder import compiling_alone",
            "with compiling_alone():",
            "    print('held', flush=True)",
            "    input()",
        )
    )
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        entered = threading.Event()

        def enter() -> None:
            with cache_folder.compiling_alone():
                entered.set()

        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.3)
        other.kill()
        waiting.join(timeout=30)
        assert entered.is_set()


def test_the_work_names_each_type_and_ends_with_the_sampler() -> None:
    both = [what for what, _ in warm._work((torch.bfloat16, torch.float32))]
    one = [what for what, _ in warm._work((torch.float32,))]
    assert len(both) == 2 * (len(one) - 3) + 3 and both[-1] == one[-1] == "the sampler"


def test_the_process_beside_compiles_the_sampler() -> None:
    beside = warm._compile_sampler_beside()
    assert beside is not None and beside.wait(timeout=100) == 0


@pytest.mark.timeout(300)  # the first time ever it compiles
def test_serving_compiles_nothing_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", AFTER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "0", done.stdout
