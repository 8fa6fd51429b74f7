"""New weights as they come: a folder of safetensors, or a trainer's state dict; read here, and judged by `plan`.

Files are read by `read`, never mapped: a mapped file that is cut short while it is read ends the process with SIGBUS.
Each tensor is read once, so what was checked is what is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from myserve.errors import BadSnapshotError

__all__ = [
    "DTYPES", "INDEX", "Checksum", "FolderSnapshot", "Snapshot", "StateDictSnapshot", "TensorInfo", "open_snapshot",
    "weights_checksum",
]  # fmt: skip

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20  # the format's own limit


class TensorInfo(NamedTuple):
    """A tensor's dtype and shape, known before its values are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Snapshot(Protocol):
    """Named tensors: what they are, and their values one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> Tensor:
        """Return the values, contiguous, on the CPU."""
        ...

    def close(self) -> None: ...


class StateDictSnapshot:
    """A trainer's `state_dict()`. Its tensors must not change until the update has ended."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        for name, tensor in state_dict.items():
            if not isinstance(tensor, Tensor):
                raise BadSnapshotError(f"{name} is a {type(tensor).__name__}, not a tensor")
        self._state_dict = state_dict
        self.tensors = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in state_dict.items()}

    def read(self, name: str) -> Tensor:
        return self._state_dict[name].detach().to("cpu").contiguous()

    def close(self) -> None:
        """There is nothing to close."""


class _Place(NamedTuple):
    file: FileIO
    start: int


class FolderSnapshot:
    """All safetensors of a folder; where it has an index, those of the index, every tensor of it included.

    Raises BadSnapshotError for a folder or file that is missing, torn, or not safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        self._files = ExitStack()
        try:
            index = self._index()
            paths = {self.folder / file for file in index.values()} or set(self.folder.glob("*.safetensors"))
            if not paths:
                raise BadSnapshotError(f"{self.folder.name} is not a folder with safetensors")
            for path in sorted(paths):
                self._open(path)
            if absent := sorted(index.keys() - self.tensors.keys()):
                raise BadSnapshotError(f"{INDEX} lists {absent[0]}, and no file has it")
        except OSError as error:
            self.close()
            raise BadSnapshotError(f"{self.folder.name} cannot be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Tensor:
        info, (file, start) = self.tensors[name], self._places[name]
        raw = torch.empty(info.num_bytes, dtype=torch.uint8)
        try:
            file.seek(start)
            got = _read_into(file, raw.numpy().data)
        except OSError as error:
            raise BadSnapshotError(f"{name} cannot be read: {error.strerror}") from error
        if got != info.num_bytes:
            raise BadSnapshotError(f"{name} is cut short: {got} of {info.num_bytes} bytes are there")
        return raw.view(info.dtype).reshape(info.shape)

    def close(self) -> None:
        self._files.close()

    def _index(self) -> dict[str, str]:
        """Tensor to file name, where the folder has an index."""
        path = self.folder / INDEX
        if not path.exists():
            return {}
        try:
            files = json.loads(path.read_text())["weight_map"]
            if all(isinstance(f, str) and Path(f).name == f for f in files.values()):
                return dict(files)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise BadSnapshotError(f"{INDEX} is not an index of safetensors")

    def _open(self, path: Path) -> None:
        file = self._files.enter_context(path.open("rb", buffering=0))
        size = path.stat().st_size
        length = int.from_bytes(file.read(8) or b"", "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise BadSnapshotError(f"{path.name} is torn or no safetensors: its header does not fit it")
        try:
            raw = bytearray(length)
            _read_into(file, memoryview(raw))
            header = json.loads(raw)
            places = {n: _described(e) for n, e in header.items() if n != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadSnapshotError(f"{path.name} is torn or no safetensors: its header is broken") from error
        reached = 0  # the format has tensors side by side, from the header to the end of the file
        for name, (info, begin, end) in sorted(places.items(), key=lambda place: place[1][1:]):
            if name in self.tensors:
                raise BadSnapshotError(f"{name} stands in two files")
            if begin != reached or end - begin != info.num_bytes or 8 + length + end > size:
                raise BadSnapshotError(f"{path.name} is torn: {name} does not fit it")
            self.tensors[name] = info
            self._places[name] = _Place(file, 8 + length + begin)
            reached = end
        if 8 + length + reached != size:
            raise BadSnapshotError(
                f"{path.name} has {size - 8 - length - reached} bytes behind its last tensor: it is torn, or another's"
            )


def _read_into(file: FileIO, memory: memoryview) -> int:
    """All of it, or what there is: one read of the system gives 2 GiB at most."""
    got = 0
    while got < len(memory) and (more := file.readinto(memory[got:])):
        got += more
    return got


def _described(entry: dict[str, Any]) -> tuple[TensorInfo, int, int]:
    begin, end = map(int, entry["data_offsets"])
    if isinstance(entry["dtype"], str) and entry["dtype"] not in DTYPES:
        raise BadSnapshotError(f"it has tensors of the type {entry['dtype'][:20]}, which is not read here")
    return TensorInfo(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))), begin, end


def open_snapshot(source: str | Path | Mapping[str, Tensor]) -> Snapshot:
    """Open a folder of safetensors, or a state dict, for reading."""
    return StateDictSnapshot(source) if isinstance(source, Mapping) else FolderSnapshot(source)


class Checksum:
    """SHA-256 over the sorted lines `name dtype shape sha256-of-the-bytes`: the same for a folder, however it is cut
    into files, and for a state dict with the same tensors.

    >>> checksum = Checksum()
    >>> checksum.add("w", torch.ones(2, 3))
    >>> checksum.value()[:15]
    'sha256:b705b2db'
    """

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:  # contiguous, on the CPU
        raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = "x".join(map(str, tensor.shape))
        self._lines[name] = f"{name} {dtype} {shape} {hashlib.sha256(raw.data).hexdigest()}\n"

    def value(self) -> str:
        lines = "".join(self._lines[name] for name in sorted(self._lines))
        return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def weights_checksum(source: str | Path | Mapping[str, Tensor]) -> str:
    """Return the checksum of a folder of safetensors or of a state dict, as an update returns and checks it.

    >>> weights_checksum({"w": torch.ones(2, 3)})[:15]
    'sha256:b705b2db'
    """
    snapshot = open_snapshot(source)
    try:
        checksum = Checksum()
        for name in snapshot.tensors:
            checksum.add(name, snapshot.read(name))
        return checksum.value()
    finally:
        snapshot.close()
