"""OpenAI's batches: made of a file, read, listed and cancelled by the key's owner alone."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from myserve.errors import RequestError
from myserve.server.answers.streaming import json_response
from myserve.server.routes.batches_api.batches import Batches
from myserve.server.routes.batches_api.file_routes import batches_of, owner, page_of, query_number
from myserve.server.routes.batches_api.file_routes import router as files
from myserve.server.routes.batches_api.file_store import KEPT_SECONDS
from myserve.server.routes.batches_api.job import BatchJob
from myserve.server.routes.batches_api.line_calls import ROUTES
from myserve.server.routes.body import documented, read_request
from myserve.wire.batches_api.objects import BATCHES, BatchList, BatchObject, BatchRequest, seconds_of_window

__all__ = ["router"]

router = APIRouter(tags=["Batches"])
router.include_router(files)

MOST_UNFINISHED = 256
MOST_LISTED = 100


@router.post(BATCHES, openapi_extra=documented(BatchRequest, BatchObject))
async def create_batch(http: Request) -> Response:
    """Begin a batch: its lines are answered while nobody waits."""
    asked, batches = await read_request(http, BatchRequest), batches_of(http)
    if asked.endpoint not in ROUTES:
        raise RequestError(
            f"endpoint must be one of {', '.join(ROUTES)}, got {asked.endpoint[:80]!r}", param="endpoint"
        )
    seconds = seconds_of_window(asked.completion_window)
    file = batches.files.get(owner(), asked.input_file_id)
    if file.purpose != "batch":
        raise RequestError(
            f"the file {file.id!r} has the purpose {file.purpose}: a batch reads one of the purpose batch",
            param="input_file_id",
        )
    if len(batches.runs) >= MOST_UNFINISHED:
        raise RequestError(
            f"{MOST_UNFINISHED} batches run here, and no more may; wait for one to end",
            code="too_many_batches",
        )
    expires = asked.output_expires_after
    now = int(batches.jobs.now())
    job = batches.jobs.make(
        owner=owner(),
        endpoint=asked.endpoint,
        input_file_id=file.id,
        completion_window=asked.completion_window,
        created_at=now,
        expires_at=now + seconds,
        metadata=asked.metadata,
        output_seconds=KEPT_SECONDS if expires is None else expires.seconds,
    )
    batches.runs.start(job)
    return json_response(job.body(batches.warnings))


@router.get(BATCHES, openapi_extra=documented(None, BatchList))
async def list_batches(http: Request) -> Response:
    """Return the caller's batches, the newest first, a page at a time."""
    batches = batches_of(http)
    limit = query_number(http, "limit", 20, most=MOST_LISTED)
    bodies = [job.body(batches.warnings) for job in batches.jobs.of(owner())]
    page, has_more = page_of(http, bodies, limit)
    return json_response(
        BatchList(
            object="list",
            data=page,
            first_id=page[0]["id"] if page else None,
            last_id=page[-1]["id"] if page else None,
            has_more=has_more,
        )
    )


@router.get(f"{BATCHES}/{{batch_id}}", openapi_extra=documented(None, BatchObject))
async def show_batch(http: Request, batch_id: str) -> Response:
    """Return a batch as far as it has come."""
    batches = batches_of(http)
    return json_response(_found(batches, batch_id).body(batches.warnings))


@router.post(f"{BATCHES}/{{batch_id}}/cancel", openapi_extra=documented(None, BatchObject))
async def cancel_batch(http: Request, batch_id: str) -> Response:
    """End a batch with the lines that are answered. One that has ended, or is about to, stays as it is."""
    batches = batches_of(http)
    job = _found(batches, batch_id)
    batches.runs.cancel(job)
    return json_response(job.body(batches.warnings))


def _found(batches: Batches, batch_id: str) -> BatchJob:
    return batches.jobs.get(owner(), batch_id)
