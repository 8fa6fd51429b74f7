"""The library's vector math is asked by one thread alone before several ask it at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from myserve import exact_forward
from myserve.engine.batch_invariance import vml_warmup
from myserve.engine.config import EngineConfig
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.weights import loader

BY_VML = {
    "acos",
    "asin",
    "atan",
    "cos",
    "erf",
    "erfc",
    "exp",
    "log",
    "log2",
    "log10",
    "sin",
    "sqrt",
    "tan",
    "tanh",
}


class Calls(TorchDispatchMode):
    """Of functions that PyTorch may leave to VML: of how many numbers, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0].removesuffix("_") in BY_VML:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def served(folder: Path) -> None:
    config = EngineConfig(dtype="float32", num_blocks=16)
    ModelRunner(loader.load(str(folder), config), config)


def trained(folder: Path) -> None:
    model = exact_forward(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval())
    model(torch.zeros(2, 64, dtype=torch.int64))


@pytest.mark.parametrize("use", [served, trained])
def test_the_first_call_is_one_numbers(
    use: Callable[[Path], None], tiny_model: Callable[[str], Path]
) -> None:
    with Calls() as calls:
        use(tiny_model("qwen3"))
    first, *others = calls.sizes
    assert first == 1 < max(others), "several threads share the cosines of many"


def test_the_control(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    monkeypatch.setattr(vml_warmup, "initialize", lambda: None)
    with Calls() as calls:
        served(tiny_model("qwen3"))
    assert calls.sizes[0] > 1
