"""Modules that multiply by PyTorch's own product are named; ours, and products of one term, are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from myserve.engine.batch_invariance import patch
from myserve.engine.config import EngineConfig
from myserve.engine.runner.library_products import library_products
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.weights.loader import load


def test_a_module_that_is_not_ours_is_named(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(num_blocks=16)
    assert library_products(ModelRunner(load(str(tiny_model("qwen3_moe")), config), config).model) == []
    monkeypatch.setattr(patch, "pack_own_matrices", lambda *_: 0)
    runner = ModelRunner(load(str(tiny_model("qwen3_moe")), config), config)
    assert library_products(runner.model) == ["Qwen3MoeTopKRouter"]
