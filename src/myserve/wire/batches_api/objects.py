"""OpenAI's files and batches on the wire: what is asked, and the objects that are told."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from myserve.errors import RequestError
from myserve.wire.base import Integer, WireModel
from myserve.wire.batches_api.usage import BatchUsage

__all__ = [
    "BATCHES",
    "FILES",
    "BatchCounts",
    "BatchErrors",
    "BatchFault",
    "BatchList",
    "BatchObject",
    "BatchRequest",
    "BatchStatus",
    "DeletedFile",
    "ExpiresAfter",
    "FileList",
    "FileObject",
    "seconds_of_window",
]

FILES, BATCHES = "/v1/files", "/v1/batches"
MAX_WINDOW = 30 * 86_400  # seconds

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]

_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ExpiresAfter(WireModel):
    """The time for which a file is kept, from when it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[Integer, Field(ge=3600, le=2_592_000)]


class BatchRequest(WireModel):
    """`POST /v1/batches`. `completion_window`: OpenAI has 24h alone; here any number of s, m, h or d up to 30d.

    >>> BatchRequest(input_file_id="file-1", endpoint="/v1/completions", completion_window="24h").endpoint
    '/v1/completions'
    """

    input_file_id: Annotated[str, Field(min_length=1)]
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


def seconds_of_window(window: str) -> int:
    """Return the seconds of a completion window. Raises RequestError.

    >>> seconds_of_window("24h"), seconds_of_window("90s")
    (86400, 90)
    """
    found = _WINDOW.fullmatch(window)
    seconds = 0 if found is None else int(found[1]) * _SECONDS[found[2]]
    if not 0 < seconds <= MAX_WINDOW:
        raise RequestError(
            f"completion_window must be a time such as 24h, 90m or 2d, of 30d at most; got {window[:40]!r}",
            param="completion_window",
        )
    return seconds


class FileObject(TypedDict):
    """A file. `warnings` is ours."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    warnings: list[str]


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchFault(TypedDict):
    """A fault of a batch, or of a line of its input, counted from 1."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(TypedDict):
    object: Literal["list"]
    data: list[BatchFault]


class BatchCounts(TypedDict):
    total: int
    completed: int
    failed: int


class BatchObject(TypedDict):
    """A batch as far as it has come. Times in unix seconds. `warnings` is ours."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None
    warnings: list[str]


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
