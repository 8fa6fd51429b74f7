"""A quantised checkpoint is served with the bits of the weights that it stands for, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from conftest import make_tiny_model
from engine.test_exactness import mixed_requests, together
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.formats.decoded import DecodedSnapshot
from myserve.engine.weights.loader import load
from myserve.engine.weights.snapshot import FolderSnapshot, StateDictSnapshot
from myserve.errors import BadCheckpointError, UnsupportedModelError
from quantized_checkpoints import FORMATS, write_quantized

MADE_BY_OTHERS = Path(__file__).with_name("made_by_others.safetensors")


def opened(folder: Path, **config: object) -> Engine:
    return Engine.from_pretrained(str(folder), EngineConfig(**({"num_blocks": 64} | config)))


def answers(folder: Path, **config: object) -> object:
    engine = opened(folder, **config)
    try:
        return together(engine, mixed_requests(4, seed=3))
    finally:
        engine.shutdown()


def assert_same_weights(folder: Path, expected: Path) -> None:
    found, right = (load(str(f), EngineConfig()).model.state_dict() for f in (folder, expected))
    assert found.keys() == right.keys()
    assert [key for key in right if not torch.equal(found[key], right[key])] == []
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def refused(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load(str(folder), EngineConfig())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# --- what others wrote and read --------------------------------------------------------------------------------


def others() -> dict[str, tuple[dict[str, Any], dict[str, Tensor], Tensor]]:
    """By case: what config.json says, the tensors of the layer `X`, and their own library's dequantised weight."""
    tensors = load_file(MADE_BY_OTHERS)
    cases = json.loads(MADE_BY_OTHERS.with_suffix(".json").read_text())
    return {
        case: (
            described,
            {key.removeprefix(f"{case}/"): t for key, t in tensors.items() if key.startswith(f"{case}/X.")},
            tensors[f"{case}/expected"],
        )
        for case, described in cases.items()
    }


@pytest.mark.parametrize("case", sorted(json.loads(MADE_BY_OTHERS.with_suffix(".json").read_text())))
def test_decodes_as_the_library_that_wrote_it(case: str) -> None:
    """bitsandbytes 0.50.2 and compressed-tensors 0.20.1 wrote these (`tools.quantized_fixtures`)."""
    described, tensors, expected = others()[case]
    decoded = DecodedSnapshot(StateDictSnapshot(tensors), described, torch.float32)
    assert decoded.tensors["X.weight"].shape == tuple(expected.shape)
    # theirs may round on the way: to bfloat16, or scales to halves
    torch.testing.assert_close(decoded.read("X.weight"), expected.float(), rtol=2**-8, atol=1e-6)


def test_decodes_blocks_of_fp8_as_transformers_does() -> None:
    torch.manual_seed(0)
    weight, scales = torch.randn(64, 96).to(torch.float8_e4m3fn), torch.rand(4, 3) + 0.5
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.bfloat16)
    stored = StateDictSnapshot({"X.weight": weight, "X.weight_scale_inv": scales})
    decoded = DecodedSnapshot(stored, {"quant_method": "fp8", "weight_block_size": [16, 32]}, torch.bfloat16)
    assert torch.equal(decoded.read("X.weight"), theirs)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (64,), (64, 1)])
def test_blocks_that_are_named_have_a_scale_each(shape: tuple[int, ...]) -> None:
    """One scale of the whole, or one a row, where config.json names blocks: theirs were lost."""
    tensors = {
        "X.weight": torch.randn(64, 96).to(torch.float8_e4m3fn),
        "X.weight_scale_inv": torch.rand(shape) + 0.5,
    }
    named = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    with pytest.raises(BadCheckpointError, match=r"X.weight_scale_inv .* blocks of \(16, 32\).* \(4, 3\)"):
        DecodedSnapshot(StateDictSnapshot(tensors), named, torch.bfloat16)
    # control: as the scale that it is, without blocks, and where a block is the whole
    read = [
        DecodedSnapshot(StateDictSnapshot(tensors), {"quant_method": "fp8"} | more, torch.bfloat16).read(
            "X.weight"
        )
        for more in ({}, {"weight_block_size": [128, 128]} if len(shape) < 1 or shape[0] == 1 else {})
    ]
    right = tensors["X.weight"].float() * tensors["X.weight_scale_inv"].reshape(-1, 1)
    assert all(torch.equal(values, right.bfloat16()) for values in read)


def test_decodes_experts_in_mxfp4_as_transformers_does() -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 24, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 24, 2), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    stored = StateDictSnapshot({"X_blocks": blocks, "X_scales": scales})
    decoded = DecodedSnapshot(stored, {"quant_method": "mxfp4"}, torch.bfloat16)
    assert torch.equal(decoded.read("X"), theirs) and decoded.tensors["X"].shape == tuple(theirs.shape)


# --- served ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_loads_the_weights_that_it_stands_for(name: str, tmp_path: Path) -> None:
    quantized, plain = write_quantized(name, tmp_path)
    assert_same_weights(quantized, plain)


def test_serves_the_bits_of_the_weights_that_it_stands_for(tmp_path: Path) -> None:
    """With --quantize int8 on top; a scale that is twice as large gives others."""
    quantized, plain = write_quantized("gptq", tmp_path)
    expected = answers(plain, quantize="int8")
    assert answers(quantized, quantize="int8") == expected
    change(quantized, lambda t: t | {(k := "model.layers.0.mlp.up_proj.scales"): t[k] * 2})
    assert answers(quantized, quantize="int8") != expected


def test_loads_a_mixture_of_experts_in_fp8(tmp_path: Path) -> None:
    """Each expert has scales of its own, and is stacked after it is decoded."""
    quantized, plain = write_quantized("fp8", tmp_path, "qwen3_moe")
    assert_same_weights(quantized, plain)


def test_loads_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    plain = make_tiny_model("gpt_oss", tmp_path / "plain", dtype=torch.bfloat16)
    quantized = Path(shutil.copytree(plain, tmp_path / "quantized"))
    tensors, expected = {}, {}
    generator = torch.Generator().manual_seed(5)
    for key, tensor in load_file(plain / "model.safetensors").items():
        tensors[key] = expected[key] = tensor
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32, 16)
            blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            scales = torch.randint(122, 126, shape[:3], dtype=torch.uint8, generator=generator)
            del tensors[key]
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            expected[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
    save_file(expected, plain / "model.safetensors", {"format": "pt"})
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    described(quantized, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert_same_weights(quantized, plain)


def test_a_checkpoint_in_halves_is_served_in_bfloat16(tmp_path: Path) -> None:
    quantized, _ = write_quantized("awq", tmp_path)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert load(str(quantized), EngineConfig()).model.dtype == torch.bfloat16
    assert load(str(quantized), EngineConfig(dtype="float32")).model.dtype == torch.float32


# --- refused ---------------------------------------------------------------------------------------------------


def described(folder: Path, quantization: Mapping[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def change(folder: Path, change_of: Any) -> None:
    save_file(
        change_of(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"}
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    names = ("fp8", "gptq", "awq", "bitsandbytes-4", "bitsandbytes-8", "w8a16-zeros", "nvfp4")
    return {name: write_quantized(name, tmp_path_factory.mktemp(name))[0] for name in names}


LAYER = "model.layers.1.self_attn.q_proj"
MISSING = [
    ("fp8", "weight_scale_inv"),
    ("gptq", "scales"),
    ("gptq", "qzeros"),
    ("gptq", "g_idx"),
    ("awq", "qzeros"),
    ("bitsandbytes-4", "weight.absmax"),
    ("bitsandbytes-4", "weight.quant_map"),
    ("bitsandbytes-4", "weight.quant_state.bitsandbytes__nf4"),
    ("bitsandbytes-8", "SCB"),
    ("w8a16-zeros", "weight_zero_point"),
    ("w8a16-zeros", "weight_scale"),
    ("w8a16-zeros", "weight_packed"),
    ("nvfp4", "weight_global_scale"),
]


@pytest.mark.parametrize(("name", "part"), MISSING)
def test_a_part_that_is_missing_is_refused_by_name(
    name: str, part: str, written: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written[name], tmp_path / "torn"))
    change(folder, lambda tensors: {k: t for k, t in tensors.items() if k != f"{LAYER}.{part}"})
    assert LAYER in refused(folder)


@pytest.mark.parametrize(("name", "part"), [case for case in MISSING if "quant_state" not in case[1]])
def test_a_part_of_another_shape_is_refused_by_name(
    name: str, part: str, written: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written[name], tmp_path / "torn"))
    wrong = f"{LAYER}.{part}"

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = tensors[wrong]
        return tensors | {
            wrong: torch.cat([whole.view(torch.uint8), whole.view(torch.uint8)]).view(whole.dtype)
        }

    change(folder, cut)
    assert LAYER in refused(folder)


def test_scales_that_are_not_finite_are_refused(written: Mapping[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["fp8"], tmp_path / "torn"))
    change(folder, lambda t: t | {f"{LAYER}.weight_scale_inv": t[f"{LAYER}.weight_scale_inv"] * float("nan")})
    assert "not finite" in refused(folder)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "exl3", "bits": 3}, "exl3"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 16}, "5 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16, "dynamic": {".*": {"bits": 8}}}, "dynamic"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, "gemv"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}},
            "compressed-tensors",
        ),
        (FORMATS["w4a16"][0] | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        (FORMATS["w4a16"][0] | {"transform_config": {"config_groups": {"R1": {}}}}, "transforms"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "no tensor is"),
        ({"bits": 4}, "None"),
    ],
)
def test_a_format_that_is_not_read_is_refused_by_name(
    quantization: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    described(folder, quantization)
    assert reason in refused(folder)


def test_weights_in_fp8_beside_another_method_are_refused(
    written: Mapping[str, Path], tmp_path: Path
) -> None:
    """Nothing would tell their scales."""
    folder = Path(shutil.copytree(written["gptq"], tmp_path / "mixed"))
    change(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})
    assert "lm_head.weight is in FP8" in refused(folder)


def test_a_torn_file_is_refused(written: Mapping[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["awq"], tmp_path / "torn"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "torn" in refused(folder)


def test_transformers_reads_none_of_it(written: Mapping[str, Path]) -> None:
    """Control for the loader: by itself it would need libraries of each format, or serve noise."""
    with pytest.raises((ImportError, ValueError, RuntimeError, BadCheckpointError)):
        AutoModelForCausalLM.from_pretrained(written["gptq"])


def test_the_names_are_the_plain_ones(written: Mapping[str, Path]) -> None:
    stored = FolderSnapshot(written["w8a16-zeros"])
    names = DecodedSnapshot(stored, FORMATS["w8a16-zeros"][0], torch.bfloat16).tensors
    stored.close()
    assert f"{LAYER}.weight" in names and not any("packed" in name for name in names)
