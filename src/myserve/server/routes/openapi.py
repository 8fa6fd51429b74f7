"""`/openapi.json`: FastAPI's document of the routes, and the schemas of what routes parse themselves."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from myserve.core.params import SamplingParams
from myserve.core.ranges import Range, ranges_of
from myserve.server.errors import has_anthropic_shape
from myserve.server.routes.body import SCHEMAS
from myserve.server.routes.tokenize import DetokenizeRequest, TokenizeRequest
from myserve.server.routes.waterfall import WaterfallAnswer, WaterfallRequest
from myserve.wire.batches_api.objects import (
    BatchList,
    BatchObject,
    BatchRequest,
    DeletedFile,
    FileList,
    FileObject,
)
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.dialects import decisions, lora, sglang, sglang_generate, tinker, vllm
from myserve.wire.generate import GenerateRequest
from myserve.wire.messages_api.answer import (
    MessageEvent,
    MessageOfAssistant,
    MessagesError,
    MessageTokensCount,
)
from myserve.wire.messages_api.request import CountTokensRequest, MessagesRequest
from myserve.wire.responses import ChatChunk, ChatCompletion, Completion, ErrorResponse, Generated
from myserve.wire.responses_api.answer import (
    DeletedResponse,
    InputItemList,
    InputTokenCount,
    ResponseEvent,
    ResponseObject,
)
from myserve.wire.responses_api.request import ResponseRequest
from myserve.wire.sessions import SessionBody
from myserve.wire.weights import HotLoadRequest, HotLoadState, WeightsReport, WeightsRequest

__all__ = ["openapi"]

BODIES = (
    *(ChatCompletionRequest, CompletionRequest, GenerateRequest, WeightsRequest, HotLoadRequest),
    *(TokenizeRequest, DetokenizeRequest, WaterfallRequest),
    *(ResponseRequest, MessagesRequest, CountTokensRequest),
    *(decisions.DecisionRequest, decisions.SystemOneRequest, BatchRequest),
    *(vllm.AbortRequests, vllm.WeightTransferInit, vllm.StartWeightUpdate, vllm.UpdateWeights),
    *(vllm.FinishWeightUpdate, vllm.WeightVersionUpdate, vllm.WeightChecker),
    *(lora.LoadAdapter, lora.UnloadAdapter),
    *(sglang.MemoryTags, sglang.WeightsChecker),
    *(sglang.PauseGeneration, sglang.ContinueGeneration, sglang.AbortRequest),
    *(
        tinker.CreateSession,
        tinker.SessionHeartbeat,
        tinker.CreateSamplingSession,
        tinker.JoinSamplingSession,
    ),
    *(tinker.TinkerSample, tinker.PromiseName),
    *(sglang.UpdateWeightsFromDisk, sglang.UpdateWeightsFromTensor, sglang_generate.NativeGenerate),
)
ANSWERS = (
    *(ChatCompletion, ChatChunk, Completion, Generated, WeightsReport, HotLoadState, ErrorResponse),
    *(
        WaterfallAnswer,
        sglang_generate.NativeAnswer,
        decisions.Decision,
        decisions.SystemOneAnswers,
        SessionBody,
    ),
    *(MessageOfAssistant, MessageEvent, MessageTokensCount, MessagesError),
    *(ResponseObject, ResponseEvent, DeletedResponse, InputItemList, InputTokenCount),
    *(FileObject, FileList, DeletedFile, BatchObject, BatchList),
)
ERROR = {
    "description": "What was wrong and whose fault it is, in OpenAI's shape.",
    "content": {"application/json": {"schema": {"$ref": SCHEMAS + "ErrorResponse"}}},
}

MESSAGES_ERROR = {
    "description": "What was wrong and whose fault it is, in Anthropic's shape.",
    "content": {"application/json": {"schema": {"$ref": SCHEMAS + "MessagesError"}}},
}


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, which is made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=version("myserve"), routes=app.routes)
        document.setdefault("components", {})["schemas"] = _schemas(app.state.settings.max_logprobs)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                # FastAPI's own; here it is a 400
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = MESSAGES_ERROR if has_anthropic_shape(path) else ERROR
        app.openapi_schema = document
    return app.openapi_schema


def _add_ranges(properties: dict[str, Any], max_logprobs: int) -> None:
    """Add what `SamplingParams` takes to the fields of its parameters, for forms that are made of the schema."""
    ranges = dict(ranges_of(SamplingParams)) | {"top_logprobs": Range(0, max_logprobs)}
    for name, allowed in ranges.items():
        for kind in properties.get(name, {}).get("anyOf", ()):
            if kind.get("type") in ("integer", "number"):
                kind["exclusiveMinimum" if allowed.open_low else "minimum"] = allowed.low
                kind["maximum"] = allowed.high


def _schemas(max_logprobs: int) -> dict[str, Any]:
    inputs: list[tuple[str, Any, TypeAdapter[Any]]] = [
        *((kind.__name__, "validation", TypeAdapter(kind)) for kind in BODIES),
        *((kind.__name__, "serialization", TypeAdapter(kind)) for kind in ANSWERS),
    ]
    tops, shared = TypeAdapter.json_schemas(inputs, ref_template=SCHEMAS + "{model}")
    schemas: dict[str, Any] = shared["$defs"]
    schemas |= {name: schema for (name, _), schema in tops.items() if "$ref" not in schema}
    for kind in (ChatCompletionRequest, CompletionRequest):
        _add_ranges(schemas[kind.__name__]["properties"], max_logprobs)
    for schema in schemas.values():
        # the rest of a docstring is examples in Python
        if "description" in schema:
            schema["description"] = schema["description"].split("\n\n>>>")[0]
    return schemas
