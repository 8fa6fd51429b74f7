"""An int8 checkpoint has the bits of the original quantised at load, needs nothing of it, and is whole or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import make_tiny_model
from engine.test_exactness import mixed_requests, together
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.int8_checkpoint import write_int8
from myserve.errors import BadCheckpointError, RequestError, UnsupportedModelError
from runs import thorough

OpenEngine = Callable[..., Engine]
ARCHITECTURES = [
    "llama", thorough("gpt2"), thorough("gemma3_text"), "phi3", "qwen3_moe", thorough("mixtral"), "gpt_oss",
]  # fmt: skip


def opened(folder: Path, **config: object) -> Engine:
    return Engine.from_pretrained(str(folder), EngineConfig(**({"num_blocks": 128} | config)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 checkpoint of a bfloat16 llama; its original is gone."""
    folder = tmp_path_factory.mktemp("int8")
    original = make_tiny_model("llama", folder / "original", dtype=torch.bfloat16)
    write_int8(original, folder / "written")
    shutil.rmtree(original)
    return folder / "written"


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_serves_the_bits_of_the_original_quantised(arch: str, tmp_path: Path) -> None:
    original = make_tiny_model(arch, tmp_path / "original", dtype=torch.bfloat16)
    asked = mixed_requests(6, seed=11)
    engine = opened(original, quantize="int8")
    told, expected = engine.quantization, together(engine, asked)
    engine.shutdown()
    write_int8(str(original), tmp_path / "int8")
    shutil.rmtree(original)  # it is not needed any more
    engine = opened(tmp_path / "int8")
    try:
        assert engine.quantization == told and told["method"] == "int8"
        assert together(engine, asked) == expected
    finally:
        engine.shutdown()


def test_control_the_original_in_its_own_type_has_other_bits(tmp_path: Path) -> None:
    original = make_tiny_model("llama", tmp_path / "original", dtype=torch.bfloat16)
    asked, found = mixed_requests(3, seed=11), []
    for quantize in ("off", "int8"):
        engine = opened(original, quantize=quantize)
        found.append(together(engine, asked))
        engine.shutdown()
    assert found[0] != found[1]


def test_tensors_are_the_standards(written: Path) -> None:
    """Int8 values [N, K], a float32 scale [N, 1], the output layer as it was; names as in the original."""
    tensors = load_file(written / "model.safetensors")
    weight, scale = (tensors[f"model.layers.0.mlp.up_proj.{name}"] for name in ("weight", "weight_scale"))
    assert (weight.dtype, tuple(weight.shape)) == (torch.int8, (64, 32))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (64, 1))
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert sum(t.dtype == torch.int8 for t in tensors.values()) == 14
    described = json.loads((written / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "compressed-tensors" and described["ignore"] == ["lm_head"]
    with safe_open(written / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_takes_half_the_room(tmp_path: Path) -> None:
    original = make_tiny_model("odd_llama", tmp_path / "original", dtype=torch.bfloat16)
    write_int8(str(original), tmp_path / "int8")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (original, tmp_path / "int8")]
    assert sizes[1] < 0.7 * sizes[0]


def test_an_ignored_layer_stays_as_it_is(copied: Path) -> None:
    """Another's checkpoint in this format: what it has in floats is served in floats, the output layer too."""
    config = json.loads((copied / "config.json").read_text())
    del config["myserve_quantize"]
    tensors = load_file(copied / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name].float() * tensors.pop(f"{name}_scale")).bfloat16()
    (copied / "config.json").write_text(json.dumps(config))
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    engine = opened(copied)
    try:
        told = engine.quantization
        assert told["unquantized"] == ("lm_head", "model.layers.1.mlp.up_proj") and told["layers"] == 13
        asked = mixed_requests(8)
        assert together(engine, asked) == [together(engine, [one])[0] for one in asked]
    finally:
        engine.shutdown()


# --- refusals ------------------------------------------------------------------------------------------------


def refused(folder: Path, **config: object) -> str:
    with pytest.raises(RequestError) as caught:
        opened(folder, **config)
    return str(caught.value)


def test_a_torn_checkpoint_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "torn" in refused(copied)


@pytest.mark.parametrize("missing", ["model.layers.0.mlp.up_proj.weight_scale", "model.norm.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(copied: Path, missing: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors[missing]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert missing.removesuffix("_scale") in refused(copied)


def test_scales_of_another_shape_are_refused(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert f"{name} has the shape (1, 1), not (64, 1)" in refused(copied)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"intermediate_size": 128}, "shape"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"model_type": "gpt2"}, ""),
    ],
)
def test_another_models_checkpoint_is_refused(copied: Path, change: dict[str, object], reason: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))
    assert reason in refused(copied)


def test_another_scheme_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (copied / "config.json").write_text(json.dumps(config))
    assert "of 4 bits, and 8 are read" in refused(copied)


def test_options_that_exclude_it_are_refused(copied: Path, tiny_model: Callable[[str], Path]) -> None:
    assert "exact is off" in refused(copied, exact="off")
    with pytest.raises(RequestError, match="leave exact on"):
        EngineConfig(quantize="int8", exact="off")
    assert "the device is meta" in refused(tiny_model("llama"), quantize="int8", device="meta")


def test_what_cannot_be_written_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        write_int8(str(written), tmp_path / "again")
    with pytest.raises(RequestError, match="exists already"):
        write_int8(str(written), written)
    torn = make_tiny_model("llama", tmp_path / "torn")
    file = torn / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadCheckpointError, match="torn"):
        write_int8(str(torn), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torn"]
