"""Is it there, is it ready, what is it: routes that never wait for a model."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.errors import ModelNotFoundError
from myserve.server.reading import models_of
from myserve.server.streaming import json_response, to_json

router = APIRouter()


@router.get("/health")
@router.get("/healthz")
async def health(http: Request) -> Response:
    """200 while the process can serve; 503 once an engine has died, which a restart alone repairs."""
    states = models_of(http).readiness()
    dead = [name for name, state in states.items() if state == "dead"]
    if dead:
        return Response(to_json({"status": "dead", "models": dead}), 503, media_type="application/json")
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(http: Request) -> Response:
    """200 once every model that the operator wants ready is; 503 before, with the state of each."""
    states = models_of(http).readiness()
    is_ready = all(state == "ready" for state in states.values())
    body = {"status": "ready" if is_ready else "not ready", "models": states}
    return Response(to_json(body), 200 if is_ready else 503, media_type="application/json")


@router.get("/version")
async def show_version() -> Response:
    """What runs here."""
    return json_response(
        {
            "name": "myserve",
            "version": version("myserve"),
            "transformers": version("transformers"),
            "torch": version("torch"),
            "extensions": ["num_prior_tokens", "sample_index"],  # by which our SDK knows that it may use them
        }
    )


@router.get("/v1/models")
async def list_models(http: Request) -> Response:
    """The served names; the context's length where the model is loaded."""
    models = models_of(http)
    return json_response({"object": "list", "data": [_card(http, name) for name in models.names]})


@router.get("/v1/models/{name:path}")
async def show_model(http: Request, name: str) -> Response:
    """One of them."""
    if name not in models_of(http).names:
        raise ModelNotFoundError(f"the model {name[:200]!r} is not served here")
    return json_response(_card(http, name))


def _card(http: Request, name: str) -> dict[str, Any]:
    models = models_of(http)
    loaded = models.if_loaded(name)
    return {
        "id": name,
        "object": "model",
        "created": models.created,
        "owned_by": "myserve",
        "max_model_len": None if loaded is None else loaded.engine.max_model_len,
    }
