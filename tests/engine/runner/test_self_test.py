"""The self-test finds a model whose rows show in each other, by threads, odd rows or odd widths; by ours none do.

Each case is one that was served as batch-invariant, or was not, when activations were PyTorch's: the control takes our
activations out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import SMALL, trained_tokenizer
from myserve.engine.batch_invariance import patch
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine

# Architecture, hidden size, width of the MLP: all in float32.
CASES = [
    ("gemma3_text", 64, 1000),
    ("gemma3_text", 64, 128),
    ("starcoder2", 32, 1000),
    ("starcoder2", 32, 100),
    ("llama", 32, 1023),
]
each_case = pytest.mark.parametrize(("arch", "hidden", "width"), CASES, ids=str)


@pytest.fixture
def invariant(tmp_path: Path) -> Callable[..., bool]:
    """Load a model of two layers in float32 and return what the self-test found."""

    def found(arch: str, hidden: int, width: int) -> bool:
        torch.manual_seed(0)
        sizes: dict[str, Any] = SMALL | {"hidden_size": hidden, "intermediate_size": width}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **sizes)).save_pretrained(tmp_path)
        trained_tokenizer().save_pretrained(tmp_path)
        engine = Engine.from_pretrained(str(tmp_path), EngineConfig(num_blocks=130, dtype="float32"))
        try:
            return bool(engine.exactness["rows_are_independent"])
        finally:
            engine.shutdown()

    return found


@each_case
def test_our_activations_pass(arch: str, hidden: int, width: int, invariant: Callable[..., bool]) -> None:
    threads = torch.get_num_threads()
    assert invariant(arch, hidden, width)
    assert torch.get_num_threads() == threads


@each_case
def test_control_pytorchs_do_not(
    arch: str, hidden: int, width: int, invariant: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch, "install_activations", lambda model: 0)
    monkeypatch.setattr(patch, "fuse_gates", lambda model: None)
    assert not invariant(arch, hidden, width)
