"""`/openapi.json`: what FastAPI knows of the routes, and what it cannot: ours parse and shape for themselves."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from myserve.server.routes.body import SCHEMAS
from myserve.server.routes.tokenize import DetokenizeRequest, TokenizeRequest
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.generate import GenerateRequest
from myserve.wire.responses import ChatChunk, ChatCompletion, Completion, ErrorResponse, Generated
from myserve.wire.weights import HotLoadRequest, HotLoadState, WeightsReport, WeightsRequest

BODIES = (
    *(ChatCompletionRequest, CompletionRequest, GenerateRequest, WeightsRequest, HotLoadRequest),
    *(TokenizeRequest, DetokenizeRequest),
)
ANSWERS = (ChatCompletion, ChatChunk, Completion, Generated, WeightsReport, HotLoadState, ErrorResponse)
ERROR = {
    "description": "What was wrong and whose fault it is, in OpenAI's shape.",
    "content": {"application/json": {"schema": {"$ref": SCHEMAS + "ErrorResponse"}}},
}


def openapi(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=version("myserve"), routes=app.routes)
        document.setdefault("components", {})["schemas"] = _schemas()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own; here it is a 400
                operation["responses"]["default"] = ERROR
        app.openapi_schema = document
    return app.openapi_schema


def _schemas() -> dict[str, Any]:
    inputs: list[tuple[str, Any, TypeAdapter[Any]]] = [
        *((kind.__name__, "validation", TypeAdapter(kind)) for kind in BODIES),
        *((kind.__name__, "serialization", TypeAdapter(kind)) for kind in ANSWERS),
    ]
    tops, shared = TypeAdapter.json_schemas(inputs, ref_template=SCHEMAS + "{model}")
    schemas: dict[str, Any] = shared["$defs"]
    schemas |= {name: schema for (name, _), schema in tops.items() if "$ref" not in schema}
    for schema in schemas.values():
        if "description" in schema:  # the rest of a docstring is examples in Python
            schema["description"] = schema["description"].split("\n\n>>>")[0]
    return schemas
