"""The playground at `/`: one page to try a model by hand, with each token's probability as its colour."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response

__all__ = ["router"]

router = APIRouter()


@router.get("/", include_in_schema=False)
async def playground() -> Response:
    """Return the page. It uses this server alone: scripts and styles are inline, and its policy forbids the rest."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    return Response(_page(), headers=headers, media_type="text/html")


@cache
def _page() -> bytes:
    return (files(__package__) / "index.html").read_bytes()
