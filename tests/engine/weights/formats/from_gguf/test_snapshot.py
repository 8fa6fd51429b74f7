"""A GGUF file has the weights of the folder that it was written of; one with a tensor more or less is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model
from engine.test_exactness import together
from gguf_files import decoded, write_gguf
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.formats.from_gguf.file import GgufFile
from myserve.engine.weights.loader import LoadedModel, load
from myserve.errors import RequestError
from runs import mixed_requests

Kind = gguf.GGMLQuantizationType


def loaded(path: Path, **config: Any) -> LoadedModel:
    return load(str(path), EngineConfig(**config))


def refused(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        loaded(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "granite"])
def test_a_model_is_the_folder_that_it_was_written_of(arch: str, tmp_path: Path) -> None:
    folder = make_tiny_model(arch, tmp_path / "model")
    if arch == "qwen3_moe":  # what llama.cpp takes for granted
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True}))
    made = loaded(write_gguf(folder, tmp_path / "model.gguf", Kind.F32))
    right = loaded(folder)
    weights, expected = made.model.state_dict(), right.model.state_dict()
    assert weights.keys() == expected.keys() and made.max_model_len == right.max_model_len
    far = {key for key in expected if not torch.allclose(weights[key], expected[key], rtol=0, atol=2e-7)}
    assert not far  # a norm to which 1 was added is rounded; all else is equal
    assert {key for key in expected if not torch.equal(weights[key], expected[key])} <= {
        key for key in expected if arch == "gemma3_text" and "norm" in key
    }
    ids = torch.tensor([[(17 + 31 * i) % 300 + 4 for i in range(60)]])
    with torch.no_grad():  # what the configs say, too: RoPE, windows, scales
        logits = [
            AutoModelForCausalLM.from_config(each.model.config, attn_implementation="eager").eval()
            for each in (made, right)
        ]
        logits = [model(ids).logits for model in map(_with_weights, logits, (expected, expected))]
    assert torch.equal(*logits)


def _with_weights(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_quantised_weights_are_those_that_the_file_stands_for(kind: Kind, tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3", tmp_path / "model", dtype=torch.bfloat16)
    file = write_gguf(folder, tmp_path / "model.gguf", kind)
    expected = {
        key: decoded(t, kind).bfloat16() for key, t in load_file(folder / "model.safetensors").items()
    }
    weights = loaded(file).model.state_dict()
    assert [key for key in expected if not torch.equal(weights[key], expected[key])] == []


def test_serves_the_bits_of_the_same_weights_in_safetensors(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    file = write_gguf(folder, tmp_path / "small.gguf", Kind.BF16)
    asked, found = mixed_requests(4, seed=3), []
    for path in (folder, file):
        engine = Engine.from_pretrained(str(path), EngineConfig(num_blocks=64))
        found.append(together(engine, asked))
        engine.shutdown()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0"])
def test_blocks_are_decoded_as_by_transformers_own_code(kind: str, tmp_path: Path) -> None:
    """Two implementations that know nothing of each other: the package gguf's, and transformers' in PyTorch."""
    from transformers.integrations.gguf.kernels import dequantize_blocks

    which = Kind[kind]
    block, size = gguf.GGML_QUANT_SIZES[which]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (4, 512 // block, size), dtype=np.uint8)
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,)}[kind]
    for at in halves:  # scales in float16 that are finite
        raw[..., at : at + 2] = rng.random((4, 512 // block, 1)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    writer.add_tensor("x", raw.reshape(4, -1), raw_dtype=which)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GgufFile(tmp_path / "blocks.gguf").read("x")
    theirs = dequantize_blocks(torch.from_numpy(raw.reshape(4, -1)), int(which), 4, 512, torch.float32)
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-6, atol=1e-6)


def test_llama_3s_scaling_is_the_files_factors(tmp_path: Path) -> None:
    """GGUF has it as a tensor of divisors; the config has it as numbers, from which transformers makes the same."""
    folder = make_tiny_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    plain = loaded(folder).model.model.rotary_emb.inv_freq
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    scaled = loaded(folder).model.model.rotary_emb.inv_freq
    assert not torch.equal(plain, scaled)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    file = write_gguf(folder, tmp_path / "plain.gguf", Kind.F32)
    with_factors = tmp_path / "factors.gguf"
    rewritten(file, with_factors, {"rope_freqs.weight": (plain / scaled).numpy()})
    found = loaded(with_factors).model.model.rotary_emb.inv_freq
    torch.testing.assert_close(found, scaled, rtol=1e-6, atol=0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rewritten(file: Path, out: Path, more: dict[str, np.ndarray]) -> None:
    """Copy a file with further tensors."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, "llama")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in more.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- refused ---------------------------------------------------------------------------------------------------


def test_a_tensor_more_or_less_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    file = write_gguf(folder, tmp_path / "model.gguf", Kind.F32)
    rewritten(file, tmp_path / "more.gguf", {"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    assert "blk.0.attn_q.bias" in refused(tmp_path / "more.gguf")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    torn = Path(shutil.copytree(folder, tmp_path / "torn"))
    save_file(tensors, torn / "model.safetensors", {"format": "pt"})
    assert "layers.1.mlp.up_proj" in refused(write_gguf(torn, tmp_path / "less.gguf", Kind.F32))


def test_no_file_is_said_in_a_sentence(tmp_path: Path) -> None:
    assert "is no file" in refused(tmp_path / "none.gguf")
