"""A file comes as a form: it is bounded while it comes, and its fields are checked like those of any request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from myserve.errors import RequestError
from myserve.server.errors import BodyTooLargeError, TooSlowError
from myserve.server.routes.batches_api.file_store import KEPT_SECONDS, FileWriter
from myserve.server.routes.body import settings_of
from myserve.wire.batches_api.objects import ExpiresAfter

__all__ = ["MOST_FILE_BYTES", "FileFields", "copy_upload", "fields_of", "read_form"]

MOST_FILE_BYTES = 200 << 20  # OpenAI's own
FORM_BYTES = 1 << 16  # of what is around a file
MOST_FIELDS = 16
COPIED_BYTES = 1 << 20
# a client has client_timeout for each of these
PACE_BYTES = 1 << 20


class FileFields(NamedTuple):
    """The fields of an upload."""

    file: UploadFile
    filename: str
    seconds: int


async def read_form(http: Request, room: int) -> FormData:
    """Return the form of an upload, its file spooled to disk. Raises RequestError, BodyTooLargeError, TooSlowError."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError("a file is sent as multipart/form-data, in the fields file and purpose")
    limit = min(MOST_FILE_BYTES, room)
    said = http.headers.get("content-length", "")
    if said.isdigit() and int(said) > limit + FORM_BYTES:
        raise _too_large(limit)
    try:
        parser = MultiPartParser(
            http.headers, _bounded(http, limit + FORM_BYTES, limit), max_files=1, max_fields=MOST_FIELDS
        )
        return await parser.parse()
    except (MultiPartException, UnicodeDecodeError) as error:
        message = getattr(error, "message", "it is not UTF-8")
        raise RequestError(f"the form cannot be read: {message}", code="invalid_form") from None


async def _bounded(http: Request, most: int, limit: int) -> AsyncGenerator[bytes, None]:
    settings = settings_of(http)
    parts = aiter(http.stream())
    now, received = asyncio.get_running_loop().time, 0
    began = now()
    while True:
        deadline = began + settings.client_timeout * (1 + received // PACE_BYTES)
        try:
            async with asyncio.timeout_at(deadline):
                part = await anext(parts, None)
        except TimeoutError:
            raise TooSlowError("the file did not come in time", code="request_timeout") from None
        if part is None:
            return
        received += len(part)
        if received > most:
            raise _too_large(limit)
        yield part


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"a file may have {limit} bytes here now", code="file_too_large")


def fields_of(form: FormData) -> FileFields:
    """Return the checked fields of an upload. Raises RequestError."""
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise RequestError("file is missing", param="file", code="missing_required_parameter")
    if purpose != "batch":
        raise RequestError(
            f"purpose must be batch: files are for batches here; got {str(purpose)[:40]!r}", param="purpose"
        )
    return FileFields(file, (file.filename or "file")[:256], _seconds(form))


def _seconds(form: FormData) -> int:
    said: dict[str, Any] = {
        name: form[f"expires_after[{name}]"]
        for name in ("anchor", "seconds")
        if f"expires_after[{name}]" in form
    }
    if not said:
        return KEPT_SECONDS
    try:
        # a form has texts alone
        return ExpiresAfter.model_validate(said, strict=False).seconds
    except ValidationError as error:
        raise RequestError(
            f"expires_after must be an anchor, created_at, and 3600 to 2592000 seconds: {error.errors()[0]['msg']}",
            param="expires_after",
        ) from None


def copy_upload(file: UploadFile, writer: FileWriter) -> None:
    """Copy an upload into the store, in a thread."""
    while part := file.file.read(COPIED_BYTES):
        writer.write(part)
