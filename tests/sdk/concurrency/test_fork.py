"""A child that is forked from a process with a sampler can use it, and leaves its parent's alone."""

from __future__ import annotations

import os
import signal
import time

import pytest

from myserve.sdk import DeploymentSampler, FixedConcurrencyController
from myserve.sdk.testing import ScriptedTransport, ToyTokenizer
from sdk.test_loops import PROGRAM, run_program

FORKS = """
    import os
    sampler.concurrency_controller.semaphore.in_flight = 1  # as if another thread's sample were in flight at the fork
    sampler.concurrency_controller.semaphore._lock.acquire()
    child = os.fork()
    text = lambda: sampler.sync.sample_with_tokens([{"role": "user", "content": "2+2="}])[0].text
    if child == 0:
        print("child", text(), asyncio.run(sampler.sample_with_tokens([{"role": "user", "content": "3"}]))[0].text)
        import sys
        sys.stdout.flush()
        os._exit(0)
    sampler.concurrency_controller.semaphore._lock.release()
    sampler.concurrency_controller.semaphore.in_flight = 0
    os.waitpid(child, 0)
    print("parent", text())
"""


def test_a_forked_child_has_a_loop_connections_and_places_of_its_own():
    done = run_program(PROGRAM.replace('ToyTokenizer())', 'ToyTokenizer(), FixedConcurrencyController(1))').replace(
        "import DeploymentSampler", "import DeploymentSampler, FixedConcurrencyController") + FORKS)  # fmt: skip
    assert done.stdout.split() == ["4", "4", "4", "child", "4", "4", "parent", "4"], done.stderr


def test_without_connections_too():
    sampler = DeploymentSampler(
        "http://test",
        "toy",
        "",
        ToyTokenizer(),
        FixedConcurrencyController(1),
        transport=ScriptedTransport(["4"]),
    )
    assert sampler.sync.sample_with_tokens([{"role": "user", "content": "2+2="}])[0].text == "4"
    child = os.fork()
    if child == 0:
        ok = sampler.sync.sample_with_tokens([{"role": "user", "content": "2+2="}])[0].text == "4"
        os._exit(0 if ok else 1)
    for _ in range(300):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hung")
