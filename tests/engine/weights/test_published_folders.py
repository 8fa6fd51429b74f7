"""Folders as people have them: old names in configs, halves without a word of it, a second head, an adapter alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_tiny_model, trained_tokenizer
from myserve.engine.config import EngineConfig
from myserve.engine.weights.empty_model import fill, model_without_values
from myserve.engine.weights.loader import load
from myserve.engine.weights.snapshot import StateDictSnapshot

Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("published"))


def changed(original: Path, folder: Path, of_config: Change, weights: Any = None) -> Path:
    folder = Path(shutil.copytree(original, folder / "changed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(of_config(config)))
    if weights is not None:
        tensors = weights(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def without(*names: str) -> Change:
    return lambda config: {name: value for name, value in config.items() if name not in names}


def test_old_names_of_types_and_scaling_mean_what_they_meant(original: Path, tmp_path: Path) -> None:
    def old(config: dict[str, Any]) -> dict[str, Any]:
        scaling = {
            "torch_dtype": "float32",
            "rope_theta": 5000.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        }
        return without("dtype", "rope_parameters")(config) | scaling

    folder = changed(original, tmp_path, old)
    ours = load(str(folder), EngineConfig()).model
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    plain = load(str(original), EngineConfig()).model.model.rotary_emb.inv_freq
    assert not torch.equal(ours.model.rotary_emb.inv_freq, plain)


def test_halves_without_a_word_of_it_are_halves(original: Path, tmp_path: Path) -> None:
    folder = changed(
        original, tmp_path, without("dtype"), lambda tensors: {name: t.half() for name, t in tensors.items()}
    )
    assert load(str(folder), EngineConfig()).model.dtype == AutoModelForCausalLM.from_pretrained(folder).dtype


def test_a_head_that_differs_from_what_it_is_tied_to_is_its_own(original: Path, tmp_path: Path) -> None:
    """As transformers has it; in the models that we fill ourselves, too."""
    folder = changed(original, tmp_path, lambda config: config | {"tie_word_embeddings": True})
    tensors = load_file(folder / "model.safetensors")
    filled = model_without_values(
        AutoConfig.from_pretrained(folder), "auto", attention=None, trust_remote_code=False
    )
    assert filled.lm_head.weight is filled.model.embed_tokens.weight
    fill(filled, StateDictSnapshot(tensors))
    for model in (load(str(folder), EngineConfig()).model, filled):
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
        assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    fill(
        tied := _tied(folder),
        StateDictSnapshot(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    )
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def _tied(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return model_without_values(config, "auto", attention=None, trust_remote_code=False)


def test_an_adapter_alone_is_no_model(original: Path, tmp_path: Path) -> None:
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(original),
        "r": 8,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    trained_tokenizer().save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        load(str(tmp_path), EngineConfig())
    assert "config" in str(caught.value)
