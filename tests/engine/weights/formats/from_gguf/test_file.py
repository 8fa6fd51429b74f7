"""A GGUF file that is torn, cut, or lies about a length is refused in a sentence, soon, and never read beyond."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from myserve.engine.weights.formats.from_gguf.file import GgufFile, is_gguf
from myserve.errors import BadCheckpointError

LIES = {
    "tensors": ("<Q", 8), "keys": ("<Q", 16), "the first key's length": ("<Q", 24),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_token_list([f"token{i}" for i in range(20)])
    writer.add_array("llama.numbers", [1, 2, 3])
    writer.add_tensor("a", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("b", gguf.quantize(np.full((2, 32), 127, np.float32), gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def opened(raw: bytes, folder: Path) -> GgufFile:
    (folder / "x.gguf").write_bytes(raw)
    return GgufFile(folder / "x.gguf")


def test_reads_what_was_written(whole: bytes, tmp_path: Path) -> None:
    file = opened(whole, tmp_path)
    assert file.metadata["llama.context_length"] == 512 and file.metadata["llama.numbers"] == [1, 2, 3]
    assert file.metadata["tokenizer.ggml.tokens"][19] == "token19"
    assert file.read("a").tolist() == np.arange(64, dtype=np.float32).reshape(2, 32).tolist()
    assert file.read("b").tolist() == np.full((2, 32), 127.0).tolist()


def test_a_file_that_is_cut_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    used = len(whole.rstrip(b"\0"))  # behind it is padding
    for length in [*range(0, 200, 7), *range(200, used, 31)]:
        with pytest.raises(BadCheckpointError) as caught:
            opened(whole[:length], tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("value", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_count_that_lies_is_refused_at_once(lie: str, value: int, whole: bytes, tmp_path: Path) -> None:
    form, at = LIES[lie]
    with pytest.raises(BadCheckpointError):
        opened(whole[:at] + struct.pack(form, value) + whole[at + 8 :], tmp_path)


def test_an_array_that_lies_about_its_length_is_refused_at_once(whole: bytes, tmp_path: Path) -> None:
    """The package's own reader goes round 2^40 times here."""
    at = whole.index(b"llama.numbers") + len(b"llama.numbers") + 4 + 4
    with pytest.raises(BadCheckpointError, match="cut short"):
        opened(whole[:at] + struct.pack("<Q", 2**40) + whole[at + 8 :], tmp_path)


def test_any_changed_bytes_are_read_or_refused_in_a_sentence(whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    results = set()
    for _ in range(1500):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            file = opened(bytes(raw), tmp_path)
            for name in file.tensors:
                file.read(name)
            results.add("read")
        except BadCheckpointError as error:
            assert "\n" not in str(error)
            results.add("refused")
    assert results == {"read", "refused"}


def test_a_file_is_known_by_its_first_bytes(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(whole)
    assert is_gguf(str(tmp_path / "model")) and is_gguf("no/such.gguf")
    assert not is_gguf(str(tmp_path)) and not is_gguf("org/model")
