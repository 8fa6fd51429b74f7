"""Kernels are made ready under the eyes of whoever waits, and a second process can compile a part of them."""

from __future__ import annotations

import logging
import subprocess
import sys

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


def test_the_work_names_each_type_and_ends_with_the_sampler() -> None:
    both = [what for what, _ in warm._work((torch.bfloat16, torch.float32))]
    one = [what for what, _ in warm._work((torch.float32,))]
    assert len(both) == 2 * (len(one) - 2) + 2 and both[-1] == one[-1] == "the sampler"


def test_the_process_beside_compiles_the_sampler() -> None:
    beside = warm._compile_sampler_beside()
    assert beside is not None and beside.wait(timeout=100) == 0


@pytest.mark.timeout(300)  # the first time ever it compiles
def test_serving_compiles_nothing_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", AFTER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "0", done.stdout
