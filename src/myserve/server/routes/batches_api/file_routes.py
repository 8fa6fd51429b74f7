"""OpenAI's files, as batches use them: uploaded, listed, read and deleted by the key's owner alone."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse

from myserve.errors import RequestError
from myserve.server import caller
from myserve.server.answers.streaming import json_response
from myserve.server.routes.batches_api.batches import Batches
from myserve.server.routes.batches_api.file_store import StoredFile
from myserve.server.routes.batches_api.upload import copy_upload, fields_of, read_form
from myserve.server.routes.body import documented, query_choice
from myserve.server.settings import Settings
from myserve.wire.batches_api.objects import FILES, BatchObject, DeletedFile, FileList, FileObject

__all__ = ["batches_of", "owner", "page_of", "query_number", "router"]

router = APIRouter(tags=["Batches"])

MOST_LISTED = 10_000

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}
CONTENT = {"responses": {"200": {"content": {"application/jsonl": {"schema": {"type": "string"}}}}}}

T = TypeVar("T", FileObject, BatchObject)


@router.post(FILES, openapi_extra={**FORM, **documented(answer=FileObject)})
async def upload_file(http: Request) -> Response:
    """Keep a file of a batch's requests."""
    batches = batches_of(http)
    settings: Settings = http.app.state.settings
    form = await read_form(http, max(0, settings.batch_bytes - batches.files.num_bytes))
    try:
        fields = fields_of(form)
        with batches.files.writing() as writer:
            await asyncio.to_thread(copy_upload, fields.file, writer)
            kept = batches.files.keep(writer, owner(), fields.filename, "batch", fields.seconds)
    finally:
        await form.close()
    return json_response(_object(batches, kept))


@router.get(FILES, openapi_extra=documented(None, FileList))
async def list_files(http: Request) -> Response:
    """Return the caller's files, the newest first, a page at a time."""
    batches = batches_of(http)
    files = batches.files.of(owner(), http.query_params.get("purpose"))
    if query_choice(http, "order", ("asc", "desc"), "desc") == "desc":
        files.reverse()
    limit = query_number(http, "limit", MOST_LISTED, most=MOST_LISTED)
    page, has_more = page_of(http, [_object(batches, file) for file in files], limit)
    return json_response(
        FileList(
            object="list",
            data=page,
            first_id=page[0]["id"] if page else None,
            last_id=page[-1]["id"] if page else None,
            has_more=has_more,
        )
    )


@router.get(f"{FILES}/{{file_id}}", openapi_extra=documented(None, FileObject))
async def show_file(http: Request, file_id: str) -> Response:
    """Return what is known of a file."""
    batches = batches_of(http)
    return json_response(_object(batches, batches.files.get(owner(), file_id)))


@router.get(f"{FILES}/{{file_id}}/content", openapi_extra=CONTENT)
async def read_file(http: Request, file_id: str) -> Response:
    """Return a file's bytes."""
    files = batches_of(http).files
    file = files.get(owner(), file_id)
    return FileResponse(files.path(file), media_type="application/jsonl", filename=file.filename)


@router.delete(f"{FILES}/{{file_id}}", openapi_extra=documented(None, DeletedFile))
async def delete_file(http: Request, file_id: str) -> Response:
    """Delete a file; not one that a batch reads."""
    files = batches_of(http).files
    files.delete(files.get(owner(), file_id))
    return json_response(DeletedFile(id=file_id, object="file", deleted=True))


def _object(batches: Batches, file: StoredFile) -> FileObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "warnings": batches.warnings,
    }


def batches_of(http: Request) -> Batches:
    """Return the server's files and batches."""
    batches: Batches = http.app.state.batches
    return batches


def owner() -> str:
    """Return whose key the request has."""
    return caller.current(0.0).name


def page_of(http: Request, listed: list[T], limit: int) -> tuple[list[T], bool]:
    """Return the page that a request asks for, and whether there are more. Raises RequestError for a wrong cursor."""
    start = 0
    if (after := http.query_params.get("after")) is not None:
        ids = [one["id"] for one in listed]
        if after not in ids:
            raise RequestError(f"after is {after[:80]!r}, which is not in this list", param="after")
        start = ids.index(after) + 1
    return listed[start : start + limit], len(listed) > start + limit


def query_number(http: Request, name: str, default: int, *, most: int) -> int:
    """Return a number of the query. Raises RequestError."""
    text = http.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise RequestError(f"{name} must be an integer in [1, {most}], got {text[:80]!r}", param=name)
    return int(text)
