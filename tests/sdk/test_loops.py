"""Synchronous code, notebooks, and one event loop after another: the sampler needs no care in any of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap

import pytest

from myserve.sdk import DeploymentSampler, FixedConcurrencyController
from myserve.sdk.testing import ScriptedTransport, ToyTokenizer

SUM = [{"role": "user", "content": "Solve: 2+2="}]


def scripted_sampler() -> DeploymentSampler:
    transport = ScriptedTransport(["4", "four"])
    controller = FixedConcurrencyController(1)
    return DeploymentSampler("http://test", "toy", "", ToyTokenizer(), controller, transport=transport)


def test_one_asyncio_run_after_another():
    sampler = scripted_sampler()
    for _ in range(3):
        completions = asyncio.run(sampler.sample_with_tokens(SUM, n=2))
        assert [c.text for c in completions] == ["4", "four"]


def test_synchronous_calls_work_inside_a_running_loop_too():
    sampler = scripted_sampler()

    async def notebook_cell() -> list[str]:
        return [c.text for c in sampler.sync.sample_with_tokens(SUM, n=2)]

    assert asyncio.run(notebook_cell()) == ["4", "four"]
    assert [c.text for c in sampler.sync.stream_completions("2+2=", n=2)] == ["4", "four"]
    assert [[c.text for c in group] for group in sampler.sync.sample_batch(["a", "b"])] == [["4"], ["4"]]


def test_a_run_that_is_interrupted_takes_no_permit_with_it():
    transport = ScriptedTransport(lambda prompt, index: "forever " * 100)
    controller = FixedConcurrencyController(1)
    sampler = DeploymentSampler("http://test", "toy", "", ToyTokenizer(), controller, transport=transport)

    async def leave_early() -> None:
        async for _ in sampler.stream_tokens(SUM, n=2):
            return  # neither the stream nor the sampler is closed

    asyncio.run(leave_early())
    assert (controller.in_flight, controller.semaphore.waiting) == (0, 0)
    assert len(asyncio.run(sampler.sample_with_tokens(SUM, n=2))) == 2


PROGRAM = """
    import asyncio, threading
    from aiohttp import web
    from myserve.sdk import DeploymentSampler
    from myserve.sdk.testing import ToyTokenizer, fake_events, scripted

    async def version(request):
        return web.json_response({"name": "myserve", "extensions": ["sample_index", "num_prior_tokens"]})

    async def complete(request):
        body = b"".join(fake_events(await request.json(), scripted(["4"])))
        return web.Response(body=body, headers={"content-type": "text/event-stream"})

    async def serve():
        app = web.Application()
        app.router.add_get("/version", version)
        app.router.add_post("/inference/v1/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][1]

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    port = asyncio.run_coroutine_threadsafe(serve(), loop).result()
    sampler = DeploymentSampler(f"http://127.0.0.1:{port}", "toy", "", ToyTokenizer())
    for _ in range(2):
        print(asyncio.run(sampler.sample_with_tokens([{"role": "user", "content": "2+2="}]))[0].text)
    print(sampler.sync.sample_with_tokens([{"role": "user", "content": "2+2="}])[0].text)
"""


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_sampler_that_is_never_closed_ends_in_silence():
    done = run_program(PROGRAM)
    assert (done.stdout.split(), done.stderr) == (["4", "4", "4"], "")


@pytest.mark.parametrize("heavy", ["torch", "transformers", "numpy", "pydantic", "aiohttp", "rich"])
def test_importing_the_sdk_pulls_in_nothing_heavy(heavy):
    code = f"import sys, myserve.sdk; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
