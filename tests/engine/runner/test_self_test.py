"""The self-test finds rows that show in each other, and a model whose steps do not give its own logits.

Prefilled, decoded, beyond a window; by threads, odd rows or odd widths.
Each case is one that was served as batch-invariant, or was not, when activations were PyTorch's: the control takes our
activations out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import SMALL, trained_tokenizer
from myserve.engine.batch_invariance import patch
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.mixers import attention
from myserve.engine.runner import model_runner, self_test
from myserve.errors import UnsupportedModelError

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
        try:
            engine = Engine.from_pretrained(str(tmp_path), EngineConfig(num_blocks=130, dtype="float32"))
        except UnsupportedModelError as error:
            assert "other bits in another batch" in str(error)
            return False
        engine.shutdown()
        return bool(engine.exactness["rows_are_independent"])

    return found


@each_case
def test_our_activations_pass(arch: str, hidden: int, width: int, invariant: Callable[..., bool]) -> None:
    threads = torch.get_num_threads()
    assert invariant(arch, hidden, width)
    assert torch.get_num_threads() == threads


def test_control_pytorchs_do_not(invariant: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "install_activations", lambda model: 0)
    monkeypatch.setattr(patch, "fuse_gates", lambda model: None)
    found = [invariant(*case) for case in CASES]
    # which of them show it is a matter of the processor's vectors
    assert not all(found)


CONFIG = EngineConfig(num_blocks=16)
WINDOW = 24  # of the tiny models; longer prompts than the first of the self-test need not see it


def test_beyond_a_window_a_longer_prompt_is_run(make_engine: Callable[..., Engine]) -> None:
    runner = make_engine("gemma3_text", num_blocks=16).runner
    assert self_test.prove_beyond_windows(runner, 384) == WINDOW + self_test.BEYOND
    assert self_test.prove_beyond_windows(make_engine("llama", num_blocks=16).runner, 384) == 0


def test_what_would_take_too_long_is_not_run(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "MOST_WORK", 0)
    assert self_test.prove_beyond_windows(make_engine("gemma3_text", num_blocks=16).runner, 384) == 0


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gpt_oss"])
def test_control_a_window_that_is_dropped_is_found_out(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    honest = model_runner.observe

    def without_windows(model: Any) -> Any:
        structure = honest(model)
        return replace(structure, calls=tuple(replace(call, window=0) for call in structure.calls))

    monkeypatch.setattr(model_runner, "observe", without_windows)
    with pytest.raises(UnsupportedModelError, match="other logits run beyond its window than alone"):
        Engine.from_pretrained(str(tiny_model(arch)), CONFIG)


def test_control_a_decode_that_forgets_its_prompt_is_found_out(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefills are right; keys that were stored in another step are not found."""
    honest = attention.paged_attention

    def forgets(query: torch.Tensor, keys: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if query.shape[0] == 1:
            options["window"] = 1
        return honest(query, keys, *args, **options)

    monkeypatch.setattr(attention, "paged_attention", forgets)
    with pytest.raises(UnsupportedModelError, match="other logits decoded than alone"):
        Engine.from_pretrained(str(tiny_model("llama")), CONFIG)


def test_control_keys_that_are_not_stored_are_found_out(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = attention.store_kv

    def stores_prompts_alone(key: torch.Tensor, *args: Any) -> None:
        if key.shape[0] > 1:
            honest(key, *args)

    monkeypatch.setattr(attention, "store_kv", stores_prompts_alone)
    with pytest.raises(UnsupportedModelError, match="other logits"):
        Engine.from_pretrained(str(tiny_model("llama")), CONFIG)


def test_whatever_a_model_raises_is_one_sentence(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a\nlong\nstory")

    monkeypatch.setattr(attention, "store_kv", breaks)
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM fails in the self-test \(ZeroDivision"
    ) as caught:
        Engine.from_pretrained(str(tiny_model("llama")), CONFIG)
    assert "\n" not in str(caught.value)
