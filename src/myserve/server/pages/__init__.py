"""The inspector at `/`: a page of plain files, which speaks the public API and nothing else."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from myserve.server.errors import NotFoundError

__all__ = ["router"]

router = APIRouter()

# nothing inline, nothing from elsewhere, nothing that a text could make run
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
KINDS = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}


class PageFile(NamedTuple):
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str


@router.get("/", include_in_schema=False)
async def inspector(http: Request) -> Response:
    """Return the page."""
    return _answer(http, "index.html")


@router.get("/inspector/{name:path}", include_in_schema=False)
async def page_file(http: Request, name: str) -> Response:
    """Return a script or a style of the page. Raises NotFoundError for any other name."""
    return _answer(http, name)


def _answer(http: Request, name: str) -> Response:
    found = _files().get(name)
    if found is None:
        raise NotFoundError(f"the page has no file {name[:80]!r}")
    # asked for again each time: after an upgrade no browser mixes two versions
    headers = {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
        "etag": found.etag,
    }
    if http.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)


@cache
def _files() -> dict[str, PageFile]:
    """Return every file below `static`, by its path there: what is asked for is looked up, and never becomes a path."""
    found: dict[str, PageFile] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif (kind := KINDS.get(entry.name.rpartition(".")[2])) is not None:
                content = entry.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                found[prefix + entry.name] = PageFile(content, kind, etag)

    walk(files(__package__) / "static", "")
    return found
