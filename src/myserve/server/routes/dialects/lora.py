"""Adapters loaded and unloaded while requests run, by the routes of vLLM, SGLang, prime-rl and SkyRL."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from myserve.engine.scheduling.adapter import AdapterVersion
from myserve.server.answers.streaming import json_response
from myserve.server.models import adapters
from myserve.server.routes.body import documented, models_of, read_request, settings_of
from myserve.server.routes.dialects.failures import failing_as
from myserve.wire.dialects.lora import LoadAdapter, UnloadAdapter

__all__ = ["router"]

router = APIRouter(tags=["LoRA"])

# as SGLang's routes do
_tells_success = failing_as(lambda message: {"success": False, "message": message})


@router.post("/v1/load_lora_adapter", openapi_extra=documented(LoadAdapter), response_class=PlainTextResponse)
async def load_as_vllm(http: Request) -> Response:
    """Load an adapter; replace one of the name where `load_inplace` is set."""
    request = await read_request(http, LoadAdapter)
    await _load(http, request, replaces=request.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")


@router.post(
    "/skyrl/v1/load_lora_adapter", openapi_extra=documented(LoadAdapter), response_class=PlainTextResponse
)
async def load_as_skyrl(http: Request) -> Response:
    """Load an adapter, or replace the one of the name."""
    request = await read_request(http, LoadAdapter)
    await _load(http, request, replaces=True)
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")


@router.post("/load_lora_adapter", openapi_extra=documented(LoadAdapter))
@_tells_success
async def load_adapter(http: Request) -> Response:
    """Load an adapter, or replace the one of the name: SGLang's path, and prime-rl's."""
    request = await read_request(http, LoadAdapter)
    version = await _load(http, request, replaces=True)
    return json_response(_listed(http) | {"adapter_version": version.version, "checksum": version.checksum})


@router.post(
    "/v1/unload_lora_adapter", openapi_extra=documented(UnloadAdapter), response_class=PlainTextResponse
)
async def unload_as_vllm(http: Request) -> Response:
    """Take an adapter away. Requests that have begun with it go on to their ends."""
    request = await read_request(http, UnloadAdapter)
    await adapters.unload_adapter(models_of(http), request.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


@router.post("/unload_lora_adapter", openapi_extra=documented(UnloadAdapter))
@_tells_success
async def unload_adapter(http: Request) -> Response:
    """Take an adapter away, as SGLang does."""
    request = await read_request(http, UnloadAdapter)
    await adapters.unload_adapter(models_of(http), request.lora_name)
    return json_response(_listed(http))


async def _load(http: Request, request: LoadAdapter, *, replaces: bool) -> AdapterVersion:
    return await adapters.load_adapter(
        models_of(http),
        request.lora_name,
        request.lora_path,
        weights_dir=settings_of(http).weights_dir,
        model=request.model or request.base_model_name,
        replaces=replaces,
        mode=request.mode,
    )


def _listed(http: Request) -> dict[str, object]:
    loaded = adapters.loaded_paths(models_of(http))
    return {"success": True, "status": "ok", "error_message": "", "loaded_adapters": loaded}
