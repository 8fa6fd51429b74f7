"""The config of a GGUF file is read by tables; a key that none has and a number that is none are refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest

from conftest import make_tiny_model
from gguf_files import write_gguf
from myserve.engine.config import EngineConfig
from myserve.engine.weights.formats.from_gguf.architectures import Told
from myserve.engine.weights.formats.from_gguf.config import ARCHITECTURES
from myserve.engine.weights.formats.from_gguf.file import GgufFile
from myserve.engine.weights.loader import load
from myserve.errors import RequestError

Kind = gguf.GGMLQuantizationType


def refused(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        load(str(path), EngineConfig())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


def test_a_decimal_is_what_it_was_before_float32(tmp_path: Path) -> None:
    """An epsilon of 1e-6 is 9.99999997e-07 in float32, and another number in float64."""
    folder = make_tiny_model("llama", tmp_path / "model")
    file = GgufFile(write_gguf(folder, tmp_path / "model.gguf", Kind.F32))
    told = Told.of(file, "llama")
    assert file.metadata["llama.attention.layer_norm_rms_epsilon"] != 1e-6
    assert told.values["attention.layer_norm_rms_epsilon"] == 1e-6


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"attention.scale": 0.5}, "attention.scale"),
        ({"expert_count": 8}, "expert_count"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "longrope"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "original_context_length"),
        ({"rope.dimension_count": 4}, "rope.dimension_count"),
    ],
)
def test_what_is_not_read_is_refused_by_name(extra: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    assert reason in refused(write_gguf(folder, tmp_path / "model.gguf", Kind.F32, extra))


def test_an_architecture_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reason = refused(tmp_path / "model.gguf")
    assert "rwkv6" in reason and "safetensors" in reason and all(name in reason for name in ARCHITECTURES)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "form", "value"),
    [
        ("block_count", "<I", 0),
        ("block_count", "<I", 2**32 - 1),
        ("attention.layer_norm_rms_epsilon", "<f", float("nan")),
        ("rope.freq_base", "<f", -1.0),
    ],
)
def test_an_absurd_number_is_refused_by_name(key: str, form: str, value: float, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    file = write_gguf(folder, tmp_path / "model.gguf", Kind.F32)
    data = bytearray(file.read_bytes())
    at = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4  # behind it its type
    data[at : at + 4] = struct.pack(form, value)
    file.write_bytes(data)
    assert key in refused(file)
