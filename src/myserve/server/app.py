"""The application: its routes, its middleware, and every error in OpenAI's shape. Making one starts nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from myserve.engine.memory.prefault import Reserve
from myserve.errors import MyserveError
from myserve.server import pages
from myserve.server.answers.streaming import ClientGoneError
from myserve.server.edge.access import Access, AccessControl
from myserve.server.edge.edge import Edge
from myserve.server.errors import error_response, http_error_response, status_of
from myserve.server.models.models import ModelLoader, Models, load_model
from myserve.server.observe.http_meters import HttpMeters, LoopWatchdog
from myserve.server.observe.traces import Traces
from myserve.server.routes import (
    chat,
    completions,
    decisions,
    generate,
    health,
    metrics,
    sessions,
    tokenize,
    waterfall,
    weights,
)
from myserve.server.routes.batches_api import routes as batches_api
from myserve.server.routes.batches_api.batches import Batches
from myserve.server.routes.dialects import info, lora, sglang, sglang_generate, tinker, vllm
from myserve.server.routes.dialects.promises import Promises
from myserve.server.routes.messages_api import routes as messages_api
from myserve.server.routes.openapi import openapi
from myserve.server.routes.responses_api import routes as responses_api
from myserve.server.routes.responses_api.background import BackgroundRuns
from myserve.server.routes.responses_api.store import ResponseStore
from myserve.server.sessions.store import Sessions
from myserve.server.settings import Settings

__all__ = ["create_app"]

log = logging.getLogger("myserve.server")

DIALECTS = (responses_api, messages_api, batches_api, vllm, sglang, sglang_generate, lora, tinker, info)

# nginx's number for it: the client is gone, and the number is for the access log
CLIENT_CLOSED_REQUEST = 499

# other APIs that clients of ours try first, by how their paths end, and what serves the same purpose here
SERVED_INSTEAD = {
    "/responses": "POST /v1/responses: a client's base URL ends with /v1",
    "/messages": "POST /v1/messages: a client's base URL ends before /v1",
    "/api/chat": "POST /v1/chat/completions: Ollama's API is not served",
    "/api/generate": "POST /v1/completions: Ollama's API is not served",
    "/api/tags": "GET /v1/models: Ollama's API is not served",
    "/api/show": "GET /v1/models/NAME: Ollama's API is not served",
    "/embeddings": "nothing: this server has no embeddings",
    "/chat/completions": "POST /v1/chat/completions: a client's base URL ends with /v1",
    "/completions": "POST /v1/completions: a client's base URL ends with /v1",
}


def create_app(
    settings: Settings | None = None,
    reserve: Reserve | None = None,
    load: ModelLoader | None = None,
) -> FastAPI:
    """Return an ASGI application that serves what `settings` say, by default what the environment says.

    Models load with the lifespan or, where none is run, when a request first names them. Raises RequestError for files
    of keys that hold none, and for a folder of batches that cannot be used. `reserve`: memory that a command has asked
    for ahead of the first model (`prefault.begin`). `load` takes the place of `load_model`: a fleet's engine is
    elsewhere.

    >>> app = create_app(Settings(models={"mine": "models/mine"}))
    >>> app.state.models.names
    ('mine',)
    """
    settings = Settings.from_env() if settings is None else settings
    app = FastAPI(
        title="myserve",
        lifespan=_lifespan,
        redirect_slashes=False,
        # FastAPI's own traces hold the texts of exceptions, which may quote a prompt; ours are in `otel`
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]  # FastAPI's own way to extend it
    app.state.settings = settings
    app.state.models = Models(
        settings, load or partial(load_model, reserve=reserve), None if load is None else load.cancel
    )
    app.state.promises = Promises()
    app.state.responses = ResponseStore()
    app.state.background_runs = BackgroundRuns(app.state.responses)
    app.state.sessions = Sessions(timeout=settings.session_timeout, most_bytes=settings.session_bytes)
    app.state.batches = Batches(app, settings)
    # set by a command that ends when a model does not load
    app.state.on_load_failure = None
    for family in (
        chat,
        completions,
        decisions,
        generate,
        sessions,
        tokenize,
        waterfall,
        weights,
        health,
        metrics,
        *DIALECTS,
        pages,
    ):
        app.include_router(family.router)
    app.add_exception_handler(MyserveError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGoneError, _on_client_gone)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.state.http_meters = HttpMeters()
    app.state.watchdog = LoopWatchdog()
    app.state.metrics = metrics.registry_of(app.state.models, app.state.http_meters, app.state.watchdog)
    access = Access.of(settings)
    app.add_middleware(AccessControl, access=access)
    # around it, for a browser sends its preflight without a key
    if access.origins:
        headers = ["authorization", "content-type", "x-api-key", "x-request-id", "x-session-id"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=headers,
        )
    app.state.traces = _traces(settings)
    app.add_middleware(Edge, meters=app.state.http_meters, traces=app.state.traces)
    return app


def _traces(settings: Settings) -> Traces | None:
    if settings.otlp_traces_endpoint is None:
        return None
    from myserve.server.observe.otel import OtlpTraces  # opentelemetry is an extra

    return OtlpTraces(settings.otlp_traces_endpoint)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start loading at once, without waiting: /health answers while the weights are read."""
    models: Models = app.state.models
    models.preload(app.state.on_load_failure)
    app.state.watchdog.start()
    app.state.batches.go_on()
    yield
    app.state.watchdog.stop()
    app.state.promises.close()
    app.state.background_runs.close()
    await app.state.batches.close()
    await asyncio.to_thread(models.close)
    if app.state.traces is not None:
        await asyncio.to_thread(app.state.traces.close)


async def _on_error(http: Request, error: Exception) -> Response:
    if status_of(error) >= 500:
        log.error("%s %s failed", http.method, http.url.path, exc_info=error)
    return error_response(error, http.url.path)


async def _on_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        detail = f"there is no {http.method} {http.url.path[:200]} here"
        ends = [end for end in SERVED_INSTEAD if http.url.path.rstrip("/").endswith(end)]
        detail += f"; served instead: {SERVED_INSTEAD[max(ends, key=len)]}" if ends else ""
    elif error.status_code == 405:
        detail = f"{http.url.path} does not take {http.method}"
    else:
        detail = str(error.detail)
    return http_error_response(error.status_code, detail, dict(error.headers or {}), http.url.path)


async def _on_client_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
