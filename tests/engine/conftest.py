"""Engines on tiny models, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine


@pytest.fixture(scope="session")
def make_engine(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """`make_engine("llama", num_blocks=8)`: one engine for each set of arguments, shut down at the end."""
    engines: dict[tuple[object, ...], Engine] = {}

    def make(arch: str = "llama", **config: object) -> Engine:
        key = (arch, *sorted(config.items()))
        if key not in engines:
            engines[key] = Engine.from_pretrained(
                str(tiny_model(arch)), EngineConfig(**({"num_blocks": 128} | config))
            )
        return engines[key]

    yield make
    for engine in engines.values():
        engine.scheduler.check_integrity()
        engine.shutdown()


@pytest.fixture(scope="session")
def hf_model(tiny_model: Callable[[str], Path]) -> Callable[[str], torch.nn.Module]:
    """transformers' own model of the same folder, untouched: the judge."""
    return lambda arch: AutoModelForCausalLM.from_pretrained(tiny_model(arch)).eval()
