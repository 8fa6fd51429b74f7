"""A server whose weights the tests of this folder change, and what judges each token by its mark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hot_load.weight_replay import replay
from conftest import make_tiny_model
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.loader import load
from myserve.engine.weights.prepare import Prepared, prepare
from myserve.server.settings import Settings


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots "0" to "3"; a server starts with "0"."""
    root = tmp_path_factory.mktemp("dialect-weights")
    for seed in range(4):
        make_tiny_model("qwen3", root / str(seed), seed=seed)
    return root


@pytest.fixture
def own(weights_dir: Path, open_server: Callable[[Settings], AbstractContextManager[Any]]) -> Iterator[Any]:
    """A server of this test's own."""
    settings = Settings(models={"tiny": str(weights_dir / "0")}, weights_dir=str(weights_dir))
    with open_server(settings) as server:
        yield server


Judge = Callable[[Sequence[int], Sequence[int], int, Sequence[Mapping[str, Any]]], list[float]]


@pytest.fixture(scope="session")
def judge(weights_dir: Path) -> Iterator[Judge]:
    """The logprobs that a completion must have whose tokens are marked so; version "v" is snapshot v."""
    config = EngineConfig(num_blocks=32)
    engine = Engine.from_pretrained(str(weights_dir / "0"), config)
    names = load(str(weights_dir / "0"), config).weight_names
    ready: list[Prepared] = [
        prepare(
            weights_dir / str(v), engine.runner.model, names, partial=False, checksum=None, may_cast=False
        )
        for v in range(4)
    ]

    def logprobs(
        prompt: Sequence[int], token_ids: Sequence[int], seed: int, spans: Sequence[Mapping[str, Any]]
    ) -> list[tuple[int, float]]:
        marked = [
            {"start": s["start"], "end": s["end"], "weight_version": int(s["version"])}
            | ({"recomputed": True} if s.get("recomputed") else {})
            for s in spans
        ]
        numbers = replay(
            engine, lambda v: ready[v].install(), prompt, token_ids, marked, SamplingParams(seed=seed)
        )
        return [(token_id, logprob) for token_id, logprob, _ in numbers]

    yield logprobs
    engine.shutdown()
