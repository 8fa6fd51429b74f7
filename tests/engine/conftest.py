"""Engines on tiny models, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine

GPT_OSS = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 24, "initializer_range": 0.2, "pad_token_id": 0, "rope_scaling": None,
}  # fmt: skip


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


@pytest.fixture(scope="session")
def load(tiny_model: Callable[[str], Path]) -> Callable[..., Any]:
    """`load("gpt_oss", torch.bfloat16)`: a tiny model as transformers makes it."""

    def load_(arch: str, dtype: torch.dtype = torch.float32) -> Any:
        if arch != "gpt_oss":
            return AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=dtype).eval()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **GPT_OSS)).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                torch.nn.init.normal_(parameter)
        return model

    return load_
