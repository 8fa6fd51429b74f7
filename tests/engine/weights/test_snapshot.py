"""A folder is read whole or refused; the checksum is of the tensors, wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from myserve.engine.weights.snapshot import INDEX, FolderSnapshot, weights_checksum
from myserve.errors import BadSnapshotError

TENSORS = {
    "a": torch.randn(5, 7),
    "b": torch.randn(3).bfloat16(),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3),
    "half": torch.randn(2, 2, 2).half(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    first = {name: TENSORS[name] for name in ("a", "b")}
    second = {name: TENSORS[name] for name in ("empty", "scalar", "half")}
    save_file(first, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "model-2.safetensors")
    files = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    return tmp_path


def test_what_was_saved_is_read(folder: Path) -> None:
    snapshot = FolderSnapshot(folder)
    assert snapshot.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (snapshot.tensors[name].dtype, snapshot.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(snapshot.read(name), tensor)
    snapshot.close()


def test_the_checksum_is_of_the_tensors_and_not_of_the_files(folder: Path, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "all.safetensors")
    (tmp_path / "one").mkdir()
    (tmp_path / "all.safetensors").rename(tmp_path / "one" / "all.safetensors")
    assert weights_checksum(folder) == weights_checksum(tmp_path / "one") == weights_checksum(TENSORS)


@pytest.mark.parametrize(
    "change",
    [
        {"b": TENSORS["b"].float()},
        {"a": TENSORS["a"].T.contiguous()},
        {"a": TENSORS["a"].nextafter(torch.tensor(9.0))},
        {"more": torch.ones(1)},
    ],
)
def test_any_change_changes_the_checksum(change: dict[str, torch.Tensor]) -> None:
    assert weights_checksum(TENSORS | change) != weights_checksum(TENSORS)


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    whole = path.read_bytes()
    for length in [0, 4, 8, 60, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(BadSnapshotError, match=r"torn|no safetensors"):
            FolderSnapshot(folder)


def test_a_file_that_is_cut_while_it_is_read_is_refused(folder: Path) -> None:
    snapshot = FolderSnapshot(folder)
    path = folder / "model-1.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 40)
    with pytest.raises(BadSnapshotError, match="a is cut short"):
        snapshot.read("a")
    snapshot.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model-2.safetensors").unlink(), "No such file"),
        (lambda f: [p.unlink() for p in f.iterdir()], "is not a folder with safetensors"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"c": "../x"}}'), "is not an index"),
        (lambda f: (f / INDEX).write_text('{"weight_map"'), "is not an index"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"c": "model-1.safetensors"}}'), "lists c"),
        (lambda f: save_file({"a": TENSORS["a"]}, f / "model-2.safetensors"), "a stands in two files"),
        (lambda f: (f / "model-1.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"{" * 99), "header is broken"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_says_what_is_wrong(folder: Path, spoil: object, words: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(BadSnapshotError, match=words):
        FolderSnapshot(folder)


def test_a_header_that_lies_is_refused(folder: Path) -> None:
    for entry in [
        {"dtype": "F32", "shape": [5, 7], "data_offsets": [0, 100]},
        {"dtype": "F32", "shape": [5], "data_offsets": [-20, 0]},
        {"dtype": "F31", "shape": [5], "data_offsets": [0, 20]},
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {"dtype": "F32", "shape": "5", "data_offsets": [0]},
        [],
    ]:
        header = json.dumps({"a": entry}).encode()
        data = len(header).to_bytes(8, "little") + header + b"\0" * 140
        (folder / "model-1.safetensors").write_bytes(data)
        with pytest.raises(BadSnapshotError, match="torn"):
            FolderSnapshot(folder)


@pytest.mark.parametrize("more", [b"x", b"\0" * 64])
def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path, more: bytes) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, path)
    FolderSnapshot(tmp_path).close()
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(BadSnapshotError, match=f"{len(more)} bytes behind its last tensor"):
        FolderSnapshot(tmp_path)


@pytest.mark.parametrize("places", [[(0, 12), (16, 24)], [(0, 12), (8, 16)], [(4, 16), (16, 24)]])
def test_tensors_that_do_not_lie_side_by_side_are_refused(
    tmp_path: Path, places: list[tuple[int, int]]
) -> None:
    """With holes between them, or over each other: bytes that no checksum of tensors sees."""
    header = {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("ab", places, strict=True)
    }
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(places[-1][1]))
    with pytest.raises(BadSnapshotError, match="does not fit"):
        FolderSnapshot(tmp_path)
