"""The header of a GGUF file: every count, length and offset is checked against the file before it is used.

The format is written down in ggml's docs/gguf.md. Packages that read it trust the file: a length that lies sends
them into loops of 2^60 rounds, or lets them read short. So the header is read here; blocks are decoded by
the package `gguf`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from myserve.errors import BadCheckpointError, RequestError

__all__ = ["GgufFile", "GgufTensor", "is_gguf", "need_gguf"]

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_MOST_DIMENSIONS = 4


class GgufTensor(NamedTuple):
    """A tensor as it lies in the file; `shape` is PyTorch's, its last dimension the fastest."""

    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    begin: int
    num_bytes: int


def need_gguf() -> Any:
    """Return the package `gguf`. Raises RequestError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise RequestError(
            "GGUF files need the package gguf, which the extra [server] leaves out: pip install 'myserve[gguf]'",
            param="model",
        ) from None
    return gguf


def is_gguf(model: str) -> bool:
    """Return whether a served path is a file of this format, by its name or by its first bytes."""
    path = Path(model)
    if model.endswith(".gguf"):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


@dataclass(slots=True)
class _Cursor:
    """A place in the mapped file, which no read leaves."""

    data: np.ndarray
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise BadCheckpointError("it is cut short, or a length in it is not true")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()


class GgufFile:
    """A file's metadata and the places of its tensors. Raises BadCheckpointError for one that is torn or lies."""

    def __init__(self, path: str | Path) -> None:
        gguf = need_gguf()
        self.path = Path(path)
        try:
            self._data = np.memmap(self.path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise RequestError(f"{path} is no file", param="model") from None
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise BadCheckpointError(f"{self.path.name} cannot be read as GGUF: {error}") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read(_Cursor(self._data), gguf)
        except UnicodeDecodeError as error:
            raise BadCheckpointError(
                f"{self.path.name} is torn or no GGUF file: a text of it is none"
            ) from error
        except (ValueError, OverflowError, MemoryError) as error:
            raise BadCheckpointError(f"{self.path.name} is torn or no GGUF file: {error}") from error

    def _read(self, cursor: _Cursor, gguf: Any) -> None:
        if cursor.take(4) != b"GGUF":
            raise BadCheckpointError("it does not begin with GGUF")
        if (version := cursor.number("<I")) not in _VERSIONS:
            raise BadCheckpointError(f"it says version {version}, and 2 and 3 are read")
        num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(num_keys):  # each takes bytes, so the file bounds the rounds
            key = cursor.text()
            if key in self.metadata:
                raise BadCheckpointError(f"{key} is there twice")
            self.metadata[key] = self._value(cursor, cursor.number("<I"))
        places = [self._place(cursor, gguf) for _ in range(num_tensors)]
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise BadCheckpointError(f"general.alignment is {align!r}, no power of two")
        start = -(-cursor.at // align) * align
        reached = start
        for name, tensor in sorted(places, key=lambda place: place[1].begin):
            begin = start + tensor.begin
            if name in self.tensors:
                raise BadCheckpointError(f"{name} is there twice")
            if begin < reached or begin + tensor.num_bytes > len(self._data):
                raise BadCheckpointError(f"{name} does not lie in the file, or lies over another")
            reached = begin + tensor.num_bytes
            self.tensors[name] = tensor._replace(begin=begin)

    def _value(self, cursor: _Cursor, kind: int) -> Any:
        if kind in _SCALARS:
            return cursor.number(_SCALARS[kind])
        if kind == _STRING:
            return cursor.text()
        if kind != _ARRAY:
            raise BadCheckpointError(f"it has a value of the type {kind}, which there is not")
        inner, count = cursor.number("<I"), cursor.number("<Q")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            raw = cursor.take(count * struct.calcsize(form))
            return np.frombuffer(raw, dtype=form if form != "<?" else np.bool_).tolist()
        return [self._value(cursor, inner) for _ in range(count)]

    def _place(self, cursor: _Cursor, gguf: Any) -> tuple[str, GgufTensor]:
        name, dimensions = cursor.text(), cursor.number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise BadCheckpointError(f"{name} has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
        number, offset = cursor.number("<I"), cursor.number("<Q")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise BadCheckpointError(
                f"{name} is of the type {number}, which this gguf does not know"
            ) from None
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block or math.prod(shape) > 1 << 48:
            raise BadCheckpointError(f"{name} has the shape {shape}, which {kind.name} cannot have")
        return name, GgufTensor(shape, kind, offset, math.prod(shape) // block * num_bytes)

    def read(self, name: str) -> np.ndarray:
        """Return the values of a tensor in float32, or float16 as they are. Raises BadCheckpointError."""
        gguf, tensor = need_gguf(), self.tensors[name]
        raw = self._data[tensor.begin : tensor.begin + tensor.num_bytes]
        plain = {"F32": "<f4", "F16": "<f2"}.get(tensor.kind.name)
        if plain is not None:
            return np.array(raw).view(plain).reshape(tensor.shape)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        try:
            values: np.ndarray = gguf.dequantize(np.array(rows), tensor.kind)
        except NotImplementedError as error:
            raise BadCheckpointError(f"{name} is {tensor.kind.name}, which gguf does not decode") from error
        return values.reshape(tensor.shape)
