"""Health, readiness, version and the list of models: routes that never wait for a model."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.errors import ModelNotFoundError
from myserve.server.answers.streaming import json_response, to_json
from myserve.server.errors import MESSAGES, error_response
from myserve.server.models.models import ServedModel
from myserve.server.models.replicas import card_of, replicas_of
from myserve.server.routes.body import models_of
from myserve.wire.messages_api.answer import MessagesModel, MessagesModelList

__all__ = ["router"]

router = APIRouter()

ANTHROPIC_VERSION = "anthropic-version"  # the header that all of Anthropic's clients send

NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"description": "Not ready yet, or dead: the body says which."}
}


@router.get("/health", responses=NOT_READY)
@router.get("/healthz", responses=NOT_READY)
async def health(http: Request) -> Response:
    """Answer 200 once the models can be served; 503 while they load, and for good if one failed or its engine died
    and does not come back.

    An app whose lifespan is not run loads on first use: until then it is healthy with nothing loaded.
    """
    states = models_of(http).readiness()
    for trouble in ("dead", "failed", "restarting", "loading"):
        if names := [name for name, state in states.items() if state == trouble]:
            body = to_json({"status": trouble, "models": names})
            return Response(body, 503, media_type="application/json")
    versions = {name: model.engine.weight_version for name, model in _loaded(http).items()}
    # the body is the same for every probe
    header = {"myserve-weight-versions": to_json(versions).decode()}
    return json_response({"status": "ok"}, header)


@router.get("/ready", responses=NOT_READY)
async def ready(http: Request) -> Response:
    """Answer 200 once every preloaded model is loaded; 503 before, with the state of each."""
    states = models_of(http).readiness()
    is_ready = all(state == "ready" for state in states.values())
    body = {"status": "ready" if is_ready else "not ready", "models": states}
    return Response(to_json(body), 200 if is_ready else 503, media_type="application/json")


@router.get("/version")
async def show_version(http: Request) -> Response:
    """Return the versions, and how each loaded model is made batch-invariant."""
    loaded = _loaded(http)
    replicas = {name: replicas_of(model.engine) for name, model in loaded.items()}
    fleets = {
        name: [card_of(*each) for each in found.items()]
        for name, found in replicas.items()
        if found is not None
    }
    return json_response(
        {
            "name": "myserve",
            "version": version("myserve"),
            "transformers": version("transformers"),
            "torch": version("torch"),
            "exact": {name: model.engine.exactness for name, model in loaded.items()},
            "quantization": {name: model.engine.quantization for name, model in loaded.items()},
            "weights": {
                name: {"weight_version": model.engine.weight_version, "identity": model.snapshots.identity}
                for name, model in loaded.items()
            },
            **({"replicas": fleets} if fleets else {}),
            # by which our SDK knows that it may use them
            "extensions": ["num_prior_tokens", "sample_index"],
        }
    )


@router.get("/v1/models")
async def list_models(http: Request) -> Response:
    """Return the served names, with the context's length where the model is loaded.

    In Anthropic's shape to a client that sends `anthropic-version`: all at once, whatever page it asks for.
    """
    models = models_of(http)
    names = [*models.names, *models.adapters]
    if ANTHROPIC_VERSION in http.headers:
        asked = http.query_params
        rest = [] if "after_id" in asked or "before_id" in asked else names
        page = MessagesModelList(
            data=[_anthropic_card(http, name) for name in rest],
            first_id=rest[0] if rest else None,
            last_id=rest[-1] if rest else None,
            has_more=False,
        )
        return json_response(page)
    return json_response({"object": "list", "data": [_card(http, name) for name in names]})


@router.get("/v1/models/{name:path}")
async def show_model(http: Request, name: str) -> Response:
    """Return one served model. Raises ModelNotFoundError."""
    models = models_of(http)
    if name not in models.names and name not in models.adapters:
        missing = ModelNotFoundError(f"the model {name[:200]!r} is not served here")
        if ANTHROPIC_VERSION in http.headers:
            return error_response(missing, MESSAGES)  # in the shape of the card that was asked for
        raise missing
    if ANTHROPIC_VERSION in http.headers:
        return json_response(_anthropic_card(http, name))
    return json_response(_card(http, name))


def _loaded(http: Request) -> dict[str, ServedModel]:
    models = models_of(http)
    return {name: model for name in models.names if (model := models.if_loaded(name)) is not None}


def _anthropic_card(http: Request, name: str) -> MessagesModel:
    card = _card(http, name)
    longest = card["max_model_len"]
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(card["created"], UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": longest,
        "max_tokens": longest,
    }


def _card(http: Request, name: str) -> dict[str, Any]:
    """Return what a list says of a model, or of an adapter, which has a model as its parent."""
    models = models_of(http)
    parent = models.adapters.get(name)
    loaded = models.if_loaded(name if parent is None else parent)
    of_adapter: dict[str, Any] = {}
    if parent is not None and loaded is not None and name in loaded.engine.adapters:
        adapter = loaded.engine.adapters[name]
        of_adapter = {"parent": parent, "root": adapter.path, "adapter_version": adapter.version}
    return {
        "id": name,
        "object": "model",
        "created": models.created,
        "owned_by": "myserve",
        "max_model_len": None if loaded is None else loaded.engine.max_model_len,
        **of_adapter,
    }
