"""vLLM's RL control plane: pause, abort, and new weights from a folder or in parts that the requests carry."""

from __future__ import annotations

from typing import Any, cast, get_args

from fastapi import APIRouter, Request, Response

from myserve.errors import RequestError
from myserve.server.answers.streaming import json_response
from myserve.server.models import control
from myserve.server.models.models import ServedModel
from myserve.server.routes.body import documented, models_of, query_choice, read_request, settings_of
from myserve.server.routes.dialects.tensors import from_base64, is_raw, read_tensors
from myserve.wire.dialects.paths import LIVENESS
from myserve.wire.dialects.vllm import (
    AbortRequests,
    FinishWeightUpdate,
    PauseModeVLLM,
    StartWeightUpdate,
    UpdateWeights,
    WeightChecker,
    WeightTransferInit,
)

__all__ = ["router"]

router = APIRouter(tags=["vLLM"])

NO_PROCESS_GROUP = (
    "this server has no process group: its weights come over HTTP. Send a folder inside --weights-dir (weight_dir), or "
    'safetensors bytes as the body of /update_weights, or as base64 in update_info {"safetensors": …}'
)


@router.post("/pause")
async def pause(http: Request) -> Response:
    """Run no step until `/resume`; `?mode=` "abort" (default) ends requests in flight, "wait" waits, "keep" keeps."""
    mode = query_choice(http, "mode", get_args(PauseModeVLLM), "abort")
    await control.pause(await _model(http), cast("PauseModeVLLM", mode))
    return json_response({"status": "paused"})


@router.post("/resume")
async def resume(http: Request) -> Response:
    """Go on."""
    await (await _model(http)).engine.resume()
    return json_response({"status": "resumed"})


@router.get("/is_paused")
async def is_paused(http: Request) -> Response:
    """Return whether steps run."""
    return json_response({"is_paused": (await _model(http)).engine.is_paused})


@router.post("/abort_requests", openapi_extra=documented(AbortRequests))
@router.post("/inference/v1/abort_requests", openapi_extra=documented(AbortRequests))
async def abort_requests(http: Request) -> Response:
    """End requests with the tokens that they have: those of these ids, or all."""
    request = await read_request(http, AbortRequests, may_be_empty=True)
    model = await models_of(http).get(request.model)
    count = model.in_flight.abort(request.request_ids or None)
    return json_response({"status": "aborted", "aborted": count})


@router.post("/init_weight_transfer_engine", openapi_extra=documented(WeightTransferInit))
async def init_weight_transfer_engine(http: Request) -> Response:
    """Refuse a process group. `{"init_info": {"backend": "http"}}` passes, for a client that must call this first."""
    request = await read_request(http, WeightTransferInit)
    await models_of(http).get(request.model)
    if request.init_info.get("backend") != "http":
        raise RequestError(NO_PROCESS_GROUP, param="init_info", code="unsupported_parameter")
    return json_response({"message": "Weight transfer initialized"})


@router.post("/shutdown_weight_transfer_engine")
async def shutdown_weight_transfer_engine(http: Request) -> Response:
    """Drop an update that was not finished."""
    (await _model(http)).transfer.drop()
    return json_response({"message": "Weight transfer shut down"})


@router.post("/start_weight_update", openapi_extra=documented(StartWeightUpdate))
async def start_weight_update(http: Request) -> Response:
    """From now on collect what `/update_weights` brings; `/finish_weight_update` puts all of it in place."""
    request = await read_request(http, StartWeightUpdate, may_be_empty=True)
    (await models_of(http).get(request.model)).transfer.start()
    return json_response({"message": "Weight update started"})


@router.post("/start_draft_weight_update")
async def start_draft_weight_update(http: Request) -> Response:
    """Refuse: no weights of a drafting model are served."""
    raise RequestError("this server has no draft model whose weights could be updated")


@router.post("/update_weights", openapi_extra=documented(UpdateWeights))
async def update_weights(http: Request) -> Response:
    """Put a folder's weights in place, or tensors as safetensors bytes; after a start, keep these for the finish."""
    if is_raw(http):
        model = await _model(http)
        await _take_in(model, await read_tensors(http), label=http.query_params.get("weight_version"))
        return json_response({"message": "Weights updated"})
    request = await read_request(http, UpdateWeights)
    model = await models_of(http).get(request.model)
    if request.weight_dir is not None:
        report = await control.update_from_folder(
            model,
            settings_of(http).weights_dir,
            request.weight_dir,
            mode=request.mode or "keep",
            label=request.weight_version,
        )
        version = model.snapshots.labels.of(report.weight_version)
        return json_response({"message": "Weights updated", "weight_version": version})
    if request.tensors is None:
        raise RequestError(NO_PROCESS_GROUP, param="update_info", code="unsupported_parameter")
    tensors = await from_base64([request.tensors], "update_info.safetensors")
    await _take_in(model, tensors, label=request.weight_version, mode=request.mode or "keep")
    return json_response({"message": "Weights updated"})


async def _take_in(
    model: ServedModel, tensors: dict[str, Any], *, label: str | None, mode: Any = "keep"
) -> None:
    """Keep the tensors for the finish where an update was begun; else put them in place."""
    if model.transfer.is_open:
        model.transfer.add(tensors)
    else:
        await control.update_from_tensors(model, tensors, mode=mode, label=label)


@router.post("/finish_weight_update", openapi_extra=documented(FinishWeightUpdate))
async def finish_weight_update(http: Request) -> Response:
    """Put what came since the start in place, all at once, and call it `weight_version`."""
    request = await read_request(http, FinishWeightUpdate, may_be_empty=True)
    model = await models_of(http).get(request.model)
    tensors = model.transfer.finish()
    if tensors:
        await control.update_from_tensors(
            model, tensors, mode=request.mode or "keep", label=request.weight_version
        )
    elif request.weight_version is not None:
        model.snapshots.labels.set(model.engine.weight_version, request.weight_version)
    return json_response({"message": "Weight update finished"})


@router.get("/weight_info")
async def weight_info(http: Request) -> Response:
    """Return what the served weights are called."""
    model = await _model(http)
    return json_response({"weight_version": model.snapshots.labels.of(model.engine.weight_version)})


@router.get("/get_world_size")
async def get_world_size(http: Request) -> Response:
    """Return 1: one process has the whole model."""
    query_choice(http, "include_dp", ("true", "false", "True", "False", "1", "0"), "true")
    return json_response({"world_size": 1})


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(http: Request) -> Response:
    """Forget every cached prefix."""
    await (await _model(http)).engine.forget_prefixes()
    return json_response({"success": True})


@router.post("/weight_checker", openapi_extra=documented(WeightChecker))
async def weight_checker(http: Request) -> Response:
    """Return the weights' checksums as they lie in memory, compare them, or put zeros in their place."""
    request = await read_request(http, WeightChecker)
    model = await models_of(http).get(request.model)
    if request.action == "reset":
        await control.reset_weights(model)
        return json_response({"status": "reset"})
    checksums = await model.engine.weight_checksums()
    if request.action == "checksum":
        return json_response({"checksums": checksums})
    assert request.baseline is not None, "checked by the request itself"
    mismatches = control.compare_checksums(checksums, request.baseline)
    return json_response({"match": not mismatches, "mismatches": mismatches})


@router.post("/sleep")
async def sleep(http: Request) -> Response:
    """Give memory back until `/wake_up`: that of `?tags=`, or all. Both levels keep the weights, in a file."""
    query_choice(http, "level", ("0", "1", "2"), "1")
    allowed = settings_of(http).enable_memory_saver
    await control.release_memory(await _model(http), _tags(http), allowed=allowed)
    return json_response({"status": "sleeping"})


@router.post("/wake_up")
async def wake_up(http: Request) -> Response:
    """Bring memory back: that of `?tags=`, or all."""
    await control.restore_memory(await _model(http), _tags(http))
    return json_response({"status": "awake"})


@router.get("/is_sleeping")
async def is_sleeping(http: Request) -> Response:
    """Return whether some memory is released."""
    return json_response({"is_sleeping": bool((await _model(http)).engine.released)})


@router.get(LIVENESS)
async def liveness(http: Request) -> Response:
    """Answer as long as the server's event loop runs."""
    return json_response({"status": "alive"})


def _tags(http: Request) -> list[str] | None:
    tags = http.query_params.getlist("tags")
    if unknown := [tag for tag in tags if tag not in control.MEMORY_TAGS]:
        raise RequestError(f"tags may be kv_cache and weights, got {unknown[0][:80]!r}", param="tags")
    return tags or None


async def _model(http: Request) -> ServedModel:
    """Return the model that `?model=` names, by default the first."""
    return await models_of(http).get(http.query_params.get("model"))
