"""The facts that vLLM's and SGLang's clients ask for before they begin: one answer has the fields of both."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.core.params import SamplingParams
from myserve.engine.requests.options import SubmitOptions
from myserve.errors import EngineError
from myserve.server.answers.streaming import json_response, to_json
from myserve.server.models.models import ServedModel
from myserve.server.routes.body import models_of, settings_of

__all__ = ["router"]

router = APIRouter(tags=["SGLang", "vLLM"])

HEALTH_SECONDS = 20.0  # SGLang's own limit for the token of /health_generate


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(http: Request) -> Response:
    """Return SGLang's arguments of a server, and below `vllm_config` vLLM's; `?config_format=` changes nothing."""
    model = await _model(http)
    settings, engine = settings_of(http), model.engine
    name, path = _name_and_path(http)
    config = settings.engine
    load = engine.load
    body: dict[str, Any] = {
        "model_path": path,
        "tokenizer_path": path,
        "served_model_name": name,
        "weight_version": model.snapshots.labels.of(engine.weight_version),
        "dtype": config.dtype,
        "device": config.device,
        "trust_remote_code": config.trust_remote_code,
        "context_length": engine.max_model_len,
        "max_running_requests": config.max_num_seqs,
        "chunked_prefill_size": config.prefill_chunk,
        "host": settings.host,
        "port": settings.port,
        # one process has the whole model
        **dict.fromkeys(("tp_size", "pp_size", "dp_size", "ep_size", "nnodes", "gpu_id_step", "num_gpus"), 1),
        **dict.fromkeys(("node_rank", "base_gpu_id"), 0),
        "disaggregation_mode": "null",
        "disaggregation_bootstrap_port": None,
        "encoder_only": False,
        "skip_server_warmup": True,
        "enable_memory_saver": settings.enable_memory_saver,
        "enable_return_routed_experts": engine.routing_shape is not None,
        "enable_deterministic_inference": config.exact == "on",
        "disable_radix_cache": not config.prefix_caching,
        "load_format": "safetensors",
        "status": "ready",
        "version": version("myserve"),
        "internal_states": [
            {
                "num_running_reqs": load.num_running,
                "num_waiting_reqs": load.num_waiting,
                "token_usage": load.kv_cache_usage,
                "is_paused": engine.is_paused,
            }
        ],
        "vllm_config": {
            "model_config": {
                "model": path,
                "served_model_name": name,
                "dtype": config.dtype,
                "max_model_len": engine.max_model_len,
                "max_logprobs": settings.max_logprobs,
            },
            "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "world_size": 1},
            "scheduler_config": {
                "max_num_seqs": config.max_num_seqs,
                "max_num_batched_tokens": config.max_num_batched_tokens,
            },
            "cache_config": {"enable_prefix_caching": config.prefix_caching},
            "weight_transfer_config": {"backend": "http"},
        },
    }
    return json_response(body)


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(http: Request) -> Response:
    """Return what is served, in SGLang's words."""
    model = await _model(http)
    name, path = _name_and_path(http)
    return json_response(
        {
            "model_path": path,
            "tokenizer_path": path,
            "served_model_name": name,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": model.snapshots.labels.of(model.engine.weight_version),
            "has_image_understanding": False,
            "has_audio_understanding": False,
        }
    )


@router.get("/get_weight_version")
async def get_weight_version(http: Request) -> Response:
    """Return what the served weights are called; slime asks here."""
    model = await _model(http)
    return json_response({"weight_version": model.snapshots.labels.of(model.engine.weight_version)})


@router.get("/v1/loads")
async def loads(http: Request) -> Response:
    """Return how full the engine is. One replica, so one list entry; `?include=` is answered by the core fields."""
    model = await _model(http)
    load, engine = model.engine.load, model.engine
    total = load.num_running + load.num_waiting
    now = time.time()
    entry = {
        "dp_rank": 0,
        "timestamp": now,
        "num_running_reqs": load.num_running,
        "num_waiting_reqs": load.num_waiting,
        "num_total_reqs": total,
        "token_usage": load.kv_cache_usage,
        "utilization": load.kv_cache_usage,
        "max_running_requests": settings_of(http).engine.max_num_seqs,
        "num_preemptions": load.num_preemptions,
        "is_paused": engine.is_paused,
    }
    aggregate = {
        "total_running_reqs": load.num_running,
        "total_waiting_reqs": load.num_waiting,
        "total_reqs": total,
        "avg_token_usage": load.kv_cache_usage,
    }
    body = {
        "timestamp": datetime.fromtimestamp(now, UTC).isoformat(),
        "version": version("myserve"),
        "accelerator": None,
        "num_accelerators": 0,
        "dp_rank_count": 1,
        "loads": [entry],
        "aggregate": aggregate,
    }
    return json_response(body)


@router.get("/health_generate")
async def health_generate(http: Request) -> Response:
    """Answer 200 once a token was drawn; in a pause nothing is drawn, and the engine's thread alone must live."""
    model = await _model(http)
    if model.engine.is_paused and model.engine.is_alive:
        return json_response({"status": "paused"})
    params = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    try:
        async with asyncio.timeout(HEALTH_SECONDS):
            stream = model.engine.submit([0], params, SubmitOptions(priority=-(2**31)))
            try:
                while deltas := await stream.next_deltas():
                    for delta in deltas:
                        if delta.error is not None:
                            raise delta.error
            finally:
                stream.abort()
    except TimeoutError:
        return Response(to_json({"status": "slow"}), 503, media_type="application/json")
    except EngineError as error:
        return Response(to_json({"status": str(error)}), 503, media_type="application/json")
    return json_response({"status": "ok"})


def _name_and_path(http: Request) -> tuple[str, str]:
    """Return the model's served name and the folder or hub id that it was loaded from."""
    name = http.query_params.get("model") or models_of(http).names[0]
    return name, settings_of(http).models[name]


async def _model(http: Request) -> ServedModel:
    """Return the model that `?model=` names, by default the first."""
    return await models_of(http).get(http.query_params.get("model"))
