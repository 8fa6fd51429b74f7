"""SGLang's control plane: pause, abort, caches and new weights; a failure says `success: false`, as theirs does."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from myserve.errors import RequestError
from myserve.server.answers.streaming import json_response
from myserve.server.models import control
from myserve.server.models.models import ServedModel
from myserve.server.routes.body import documented, models_of, read_request, settings_of
from myserve.server.routes.dialects.failures import failing_as
from myserve.server.routes.dialects.tensors import from_base64, is_raw, read_tensors
from myserve.wire.dialects.sglang import (
    AbortRequest,
    ContinueGeneration,
    MemoryTags,
    PauseGeneration,
    UpdateWeightsFromDisk,
    UpdateWeightsFromTensor,
    WeightsChecker,
)
from myserve.wire.dialects.vllm import WeightVersionUpdate

__all__ = ["router"]

router = APIRouter(tags=["SGLang"])

PAUSES: dict[str, control.PauseRequest] = {"abort": "abort", "retract": "retract", "in_place": "keep"}
SAFETENSORS_ALONE = (
    "serialized_named_tensors must be safetensors files in base64, with load_format 'safetensors': pickled tensors are "
    "code, and are never read. The bytes of one file may also be the whole body, as application/octet-stream"
)
NO_PROCESS_GROUP = (
    "this server has no process group: send weights by /update_weights_from_disk, or as safetensors bytes by "
    "/update_weights_from_tensor"
)


# as SGLang's routes do
_tells_success = failing_as(lambda message: {"success": False, "message": message})


@router.post("/pause_generation", openapi_extra=documented(PauseGeneration))
async def pause_generation(http: Request) -> Response:
    """Run no step until `/continue_generation`. "abort" ends requests in flight, the other modes do not."""
    request = await read_request(http, PauseGeneration, may_be_empty=True)
    await control.pause(await models_of(http).get(request.model), PAUSES[request.mode])
    return json_response({"message": "Generation paused successfully.", "status": "ok"})


@router.post("/continue_generation", openapi_extra=documented(ContinueGeneration))
async def continue_generation(http: Request) -> Response:
    """Go on."""
    request = await read_request(http, ContinueGeneration, may_be_empty=True)
    await (await models_of(http).get(request.model)).engine.resume()
    return json_response({"message": "Generation continued successfully.", "status": "ok"})


@router.post("/abort_request", openapi_extra=documented(AbortRequest), response_class=Response)
async def abort_request(http: Request) -> Response:
    """End a request by its `rid`, or all, with the tokens that they have."""
    request = await read_request(http, AbortRequest)
    model = await models_of(http).get(request.model)
    if request.abort_all:
        model.in_flight.abort()
    elif request.rid:
        model.in_flight.abort((request.rid,))
    else:
        raise RequestError("send rid, or abort_all true", param="rid")
    return Response(status_code=200)


@router.get("/flush_cache", response_class=PlainTextResponse)
@router.post("/flush_cache", response_class=PlainTextResponse)
async def flush_cache(http: Request) -> Response:
    """Forget every cached prefix. Requests in flight keep theirs."""
    await (await _model(http)).engine.forget_prefixes()
    return PlainTextResponse("Cache flushed.\n")


@router.post("/update_weights_from_disk", openapi_extra=documented(UpdateWeightsFromDisk))
@_tells_success
async def update_weights_from_disk(http: Request) -> Response:
    """Put a folder's weights in place. In a pause requests stay as they are; else they finish first, or are ended."""
    request = await read_request(http, UpdateWeightsFromDisk)
    model = await models_of(http).get(request.model)
    paused = len(model.in_flight) if model.engine.is_paused else 0
    report = await control.update_from_folder(
        model,
        settings_of(http).weights_dir,
        request.model_path,
        mode=control.mode_now(model, "abort" if request.abort_all_requests else "drain"),
        label=request.weight_version,
        reset_prefix_cache=request.flush_cache,
    )
    if request.keep_pause and not model.engine.is_paused:
        await model.engine.pause("keep")
    return json_response(_updated(model, report) | {"num_paused_requests": paused})


@router.post("/update_weights_from_tensor", openapi_extra=documented(UpdateWeightsFromTensor))
@_tells_success
async def update_weights_from_tensor(http: Request) -> Response:
    """Put the tensors of a request in place, the others stay: safetensors in base64, or as the body itself."""
    if is_raw(http):
        query = http.query_params
        model, label = await _model(http), query.get("weight_version") or None
        tensors, aborts = await read_tensors(http), query.get("abort_all_requests", "").lower() == "true"
    else:
        request = await read_request(http, UpdateWeightsFromTensor)
        model, label = await models_of(http).get(request.model), request.weight_version
        if request.load_format != "safetensors":
            raise RequestError(SAFETENSORS_ALONE, param="load_format", code="unsupported_parameter")
        tensors = await from_base64(list(request.serialized_named_tensors), "serialized_named_tensors")
        aborts = request.abort_all_requests
    mode = control.mode_now(model, "abort" if aborts else "drain")
    report = await control.update_from_tensors(model, tensors, mode=mode, label=label)
    return json_response(_updated(model, report))


@router.post("/update_weights_from_distributed")
@router.post("/update_weights_from_ipc")
@router.post("/init_weights_update_group")
@router.post("/destroy_weights_update_group")
@_tells_success
async def update_weights_by_a_group(http: Request) -> Response:
    """Refuse: the weights do not come through a process group here."""
    raise RequestError(NO_PROCESS_GROUP, code="unsupported_parameter")


@router.post("/update_weight_version", openapi_extra=documented(WeightVersionUpdate))
@_tells_success
async def update_weight_version(http: Request) -> Response:
    """Call the served weights by another name, for vLLM's clients and SGLang's. Ends requests only where told to."""
    request = await read_request(http, WeightVersionUpdate)
    model = await models_of(http).get(request.model)
    if request.abort_all_requests:
        model.in_flight.abort()
    model.snapshots.labels.set(model.engine.weight_version, request.new_version)
    message = f"Weight version updated to {request.new_version}"
    return json_response({"success": True, "message": message, "new_version": request.new_version})


@router.post("/weights_checker", openapi_extra=documented(WeightsChecker))
@_tells_success
async def weights_checker(http: Request) -> Response:
    """Remember the weights' checksums, compare with what was remembered, return them, or put zeros in their place."""
    request = await read_request(http, WeightsChecker, may_be_empty=True)
    model = await models_of(http).get(request.model)
    if request.action in ("reset", "reset_tensors"):
        await control.reset_weights(model)
        return json_response({"success": True, "message": "Success.", "payload": None})
    checksums = await model.engine.weight_checksums()
    if request.action == "snapshot":
        model.snapshots.remembered = checksums
    elif request.action == "compare":
        if model.snapshots.remembered is None:
            raise RequestError(
                "there is nothing to compare with: action 'snapshot' comes first", param="action"
            )
        if different := control.compare_checksums(checksums, model.snapshots.remembered):
            raise RequestError(f"the weights differ in {different[0]} and {len(different) - 1} more")
    whole = hashlib.sha256(repr(sorted(checksums.items())).encode()).hexdigest()
    ranks = {f"{kind}_rank": 0 for kind in ("tp", "dp", "pp")} | {
        f"{kind}_size": 1 for kind in ("tp", "dp", "pp")
    }
    payload = {
        "checksums": checksums,
        "per_gpu_checksum": whole,
        "parallelism_info": {**ranks, "rank": 0, "size": 1},
    }
    return json_response({"success": True, "message": "Success.", "payload": [payload]})


@router.get("/release_memory_occupation")
@router.post("/release_memory_occupation", openapi_extra=documented(MemoryTags))
async def release_memory_occupation(http: Request) -> Response:
    """Give the memory of the KV cache and the weights back, by tag or all; requests in flight are computed again."""
    request = await read_request(http, MemoryTags, may_be_empty=True)
    model = await models_of(http).get(request.model)
    await control.release_memory(model, request.tags, allowed=settings_of(http).enable_memory_saver)
    return json_response({"success": True})


@router.get("/resume_memory_occupation")
@router.post("/resume_memory_occupation", openapi_extra=documented(MemoryTags))
async def resume_memory_occupation(http: Request) -> Response:
    """Bring back what was released, with the values that it had; steps run once all of it is there."""
    request = await read_request(http, MemoryTags, may_be_empty=True)
    await control.restore_memory(await models_of(http).get(request.model), request.tags)
    return json_response({"success": True})


def _updated(model: ServedModel, report: Any) -> dict[str, Any]:
    version = model.snapshots.labels.of(report.weight_version)
    return {
        "success": True,
        "message": f"Succeeded to update model weights. Weight version updated to {version}.",
        "weight_version": version,
        "checksum": report.checksum,
    }


async def _model(http: Request) -> ServedModel:
    """Return the model that `?model=` names, by default the first."""
    return await models_of(http).get(http.query_params.get("model"))
