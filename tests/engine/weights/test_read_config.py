"""A config.json that is torn or says absurd things is refused in a sentence; and what else of a folder is absurd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from myserve.engine.config import EngineConfig
from myserve.engine.weights import loader
from myserve.engine.weights.loader import load
from myserve.engine.weights.read_config import read_config
from myserve.errors import BadCheckpointError, UnsupportedModelError
from quantized_checkpoints import write_quantized


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3_5_text"), tmp_path / "copy"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "llama"'])
def test_a_torn_config_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BadCheckpointError) as caught:
        read_config(str(folder), False)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_a_billion_layers_are_refused_before_lists_are_made_of_them(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(BadCheckpointError, match="says 1000000000 num_hidden_layers; at most 4096"):
        read_config(str(folder), False)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match="is no model"):
        read_config(str(tmp_path), False)


@pytest.fixture(scope="module")
def float8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized("fp8", tmp_path_factory.mktemp("fp8"), "qwen3_5_text")[0]


@pytest.mark.parametrize(
    "described",
    [3, [], "fp8", {"quant_method": ["fp8"]}, {"quant_method": "fp8", "weight_block_size": 3}],
    ids=str,
)
def test_an_absurd_quantisation_is_refused(described: Any, float8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(float8, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
    assert_refused(folder)


def test_weights_of_a_hybrid_in_fp8_that_are_empty_or_flat_are_refused(float8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(float8, tmp_path / "copy"))
    whole = load_file(folder / "model.safetensors")
    name = next(key.removesuffix("_scale_inv") for key in whole if key.endswith("_scale_inv"))
    for spoiled in (whole[name][:0], whole[name].flatten()):
        save_file(whole | {name: spoiled.clone()}, folder / "model.safetensors", {"format": "pt"})
        assert_refused(folder)


def assert_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load(str(folder), EngineConfig())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_control_without_the_guard_it_is_a_traceback(
    float8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load", loader._load)
    folder = Path(shutil.copytree(float8, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": ["fp8"]}})
    )
    with pytest.raises(TypeError):
        loader.load(str(folder), EngineConfig(), None)
