"""A safetensors file in a request's body: its bytes alone, or base64 inside JSON."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Any

from fastapi import Request

from myserve.engine.weights.transfer import tensors_of
from myserve.errors import RequestError
from myserve.server.routes.body import read_bytes

__all__ = ["RAW_TYPES", "from_base64", "is_raw", "read_tensors"]

RAW_TYPES = ("application/octet-stream", "application/x-safetensors", "application/vnd.safetensors")


def is_raw(http: Request) -> bool:
    """Return whether the body is a safetensors file, by its content type."""
    return http.headers.get("content-type", "").partition(";")[0].strip().lower() in RAW_TYPES


async def read_tensors(http: Request) -> dict[str, Any]:
    """Return the tensors of a body that is a safetensors file. Raises BadSnapshotError."""
    # the bytes, and the tensors that are made of them
    data = await read_bytes(http, memory_factor=2)
    return await asyncio.to_thread(tensors_of, data)


async def from_base64(texts: list[str], param: str) -> dict[str, Any]:
    """Return the tensors of safetensors files in base64. Raises RequestError, BadSnapshotError."""

    def read() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for text in texts:
            try:
                data = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise RequestError(f"{param} is not base64", param=param, code="bad_snapshot") from None
            tensors = tensors_of(data)
            if twice := sorted(found.keys() & tensors.keys()):
                raise RequestError(f"{param} has {twice[0]} twice", param=param, code="bad_snapshot")
            found |= tensors
        return found

    return await asyncio.to_thread(read)
