"""One load for all who wait, whichever loop or thread they are on; no name that the operator did not give."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from myserve.embedded import embedded_model_path
from myserve.engine.steps import recordings
from myserve.errors import ModelNotFoundError, UnsupportedModelError
from myserve.server.errors import ModelLoadError
from myserve.server.models.models import Models, ServedModel, load_model
from myserve.server.settings import Settings

ECHO = Settings(models={"a": "path/a", "alias": "path/a", "b": "path/b"}, preload=("a",), force_echo=True)


class CountingLoader:
    """An echo for every path, once `release` is set."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.release = threading.Event()

    def __call__(self, path: str, settings: Settings) -> ServedModel:
        self.paths.append(path)
        assert self.release.wait(10)
        return load_model(path, settings)


def test_many_loops_one_load() -> None:
    loader = CountingLoader()
    models = Models(ECHO, loader)

    async def ask_twice(name: str) -> list[ServedModel]:
        return list(await asyncio.gather(models.get(name), models.get(name)))

    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(asyncio.run, ask_twice(name)) for name in ("a", "alias") * 2]
        loader.release.set()
        answers = [model for future in asked for model in future.result()]
    assert len({id(model) for model in answers}) == 1
    assert loader.paths == ["path/a"]
    models.close()


@pytest.mark.parametrize("name", ["c", "path/a", "../a", "/etc/passwd", "", "A"])
def test_a_name_that_is_not_served_never_reaches_the_loader(name: str) -> None:
    loader = CountingLoader()
    models = Models(ECHO, loader)
    with pytest.raises(ModelNotFoundError):
        asyncio.run(models.get(name))
    assert loader.paths == []
    models.close()


def test_who_leaves_does_not_cancel_the_load_for_the_others() -> None:
    loader = CountingLoader()
    models = Models(ECHO, loader)

    async def scene() -> ServedModel:
        timeout_protocol = asyncio.create_task(models.get("a"))
        patient = asyncio.create_task(models.get("a"))
        await asyncio.sleep(0.01)
        timeout_protocol.cancel()
        await asyncio.gather(timeout_protocol, return_exceptions=True)
        loader.release.set()
        return await patient

    assert asyncio.run(scene()) is models.if_loaded("a")
    models.close()


def test_a_failed_load_is_an_error_each_time_and_never_an_echo() -> None:
    attempts: list[str] = []

    def broken(path: str, settings: Settings) -> ServedModel:
        attempts.append(path)
        raise OSError("/secret/path is empty") if len(attempts) == 1 else UnsupportedModelError("not causal")

    models = Models(ECHO, broken)
    with pytest.raises(ModelLoadError) as caught:
        asyncio.run(models.get("b"))
    assert "secret" not in str(caught.value)  # what is not written for clients stays in the log
    with pytest.raises(ModelLoadError, match="not causal"):
        asyncio.run(models.get("b"))
    assert attempts == ["path/b"] * 2
    assert models.if_loaded("b") is None
    models.close()


def test_readiness_follows_the_load() -> None:
    loader = CountingLoader()
    models = Models(ECHO, loader)
    assert models.readiness() == {"a": "unloaded"}
    models.preload()
    assert models.readiness() == {"a": "loading"}
    loader.release.set()
    asyncio.run(models.get("a"))
    assert models.readiness() == {"a": "ready"}
    models.close()


def test_a_loaded_model_makes_its_likely_steps_ready_before_anybody_asks() -> None:
    model = load_model(str(embedded_model_path()), Settings(models={"m": "m"}))
    steps, until = model.engine.runner.recorded_steps, time.monotonic() + 30
    # as many as conftest.py leaves of them
    likely = set(recordings.likely_shapes())
    at_load = set(steps._steps)
    while not likely <= set(steps._steps) and time.monotonic() < until:
        time.sleep(0.02)
    model.engine.shutdown()
    assert likely - at_load
    assert likely <= set(steps._steps)
