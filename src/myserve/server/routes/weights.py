"""New weights: our route, which answers when they are in place, and Fireworks' hot load, which is polled."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.errors import RequestError
from myserve.server.answers.streaming import json_response
from myserve.server.models.models import ServedModel
from myserve.server.models.snapshots import snapshot_folder
from myserve.server.routes.body import documented, models_of, read_request, settings_of
from myserve.wire.weights import (
    HOT_LOAD,
    WEIGHTS,
    HotLoadRequest,
    HotLoadState,
    Replica,
    WeightsReport,
    WeightsRequest,
)

__all__ = ["router"]

router = APIRouter()

SOURCE_URL = "x-fireworks-hot-load-source-url"


@router.post(WEIGHTS, openapi_extra=documented(WeightsRequest, WeightsReport))
async def update_weights(http: Request) -> Response:
    """Answers when the new weights are in place. A client that leaves does not stop the update."""
    request = await read_request(http, WeightsRequest)
    model = await models_of(http).get(request.model)
    folder = snapshot_folder(settings_of(http).weights_dir, request.path)
    update = model.snapshots.begin(
        model.engine,
        request.path,
        folder,
        mode=request.mode,
        partial=request.partial,
        version=request.version,
        checksum=request.checksum,
        refuse_new=request.new_requests == "refuse",
        reset_prefix_cache=request.reset_prompt_cache,
    )
    report: dict[str, Any] = asdict(await update)
    name = request.model or models_of(http).names[0]
    body: WeightsReport = {"model": name, "identity": request.path, **report}  # type: ignore[typeddict-item]  # its other keys
    return json_response(body)


@router.get(WEIGHTS)
async def show_weights(http: Request) -> Response:
    """Return the state of every loaded model's weights."""
    models = models_of(http)
    loaded = {name: model for name in models.names if (model := models.if_loaded(name)) is not None}
    return json_response({"models": {name: replica_of(model) for name, model in loaded.items()}})


@router.post(HOT_LOAD, openapi_extra=documented(HotLoadRequest, HotLoadState))
async def hot_load(http: Request) -> Response:
    """Answers when the snapshot is read and found good; `GET` says when it is in place."""
    request = await read_request(http, HotLoadRequest)
    if SOURCE_URL in http.headers:
        raise RequestError(f"{SOURCE_URL} is not supported: snapshots lie in the server's weights directory")
    model = await _model_of(http)
    folder = snapshot_folder(settings_of(http).weights_dir, request.identity)
    update = model.snapshots.awaited(request.identity)
    if update is None:
        update = model.snapshots.begin(
            model.engine,
            request.identity,
            folder,
            mode=request.mode,
            partial=_is_delta(request, model),
            version=request.version,
            checksum=request.checksum,
            reset_prefix_cache=request.reset_prompt_cache,
        )
    await update.checked()
    return json_response(_state(model))


@router.get(HOT_LOAD, openapi_extra=documented(answer=HotLoadState))
async def show_hot_load(http: Request) -> Response:
    """Return where the last hot load stands."""
    return json_response(_state(await _model_of(http)))


def replica_of(model: ServedModel) -> Replica:
    snapshots = model.snapshots
    replica: Replica = {
        "current_snapshot_identity": snapshots.identity,
        "readiness": model.engine.is_alive,
        "loading_state": snapshots.loading_state(),
        "weight_version": model.engine.weight_version,
        "checksum": snapshots.checksum,
    }
    if loaded := model.engine.adapters.values():
        replica["loaded_adapters"] = [
            {"identity": a.path, "status": "loaded", "name": a.name, "adapter_version": a.version}
            for a in loaded
        ]
    return replica


def _state(model: ServedModel) -> HotLoadState:
    return {"replicas": [replica_of(model)]}


def _is_delta(request: HotLoadRequest, model: ServedModel) -> bool:
    delta = request.incremental_snapshot_metadata
    if delta is None:
        return False
    newest = model.snapshots.newest_identity
    if delta.previous_snapshot_identity not in (None, newest):
        raise RequestError(
            f"the snapshot builds on {delta.previous_snapshot_identity!r}, and the weights here are "
            f"{newest or 'those that the server started with'!r}",
            param="incremental_snapshot_metadata.previous_snapshot_identity",
        )
    return True


async def _model_of(http: Request) -> ServedModel:
    """By the deployment's name, else the model's, where the client sends them; else the first served."""
    name = http.headers.get("fireworks-deployment") or http.headers.get("fireworks-model")
    return await models_of(http).get(name)
