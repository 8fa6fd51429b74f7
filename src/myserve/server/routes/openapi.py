"""`/openapi.json`: FastAPI's document of the routes, and the schemas of what routes parse themselves."""

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

__all__ = ["openapi"]

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
    """Return the OpenAPI document, which is made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=version("myserve"), routes=app.routes)
        document.setdefault("components", {})["schemas"] = _schemas()
        for path in document["paths"].values():
            for operation in path.values():
                # FastAPI's own; here it is a 400
                operation["responses"].pop("422", None)
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
        # the rest of a docstring is examples in Python
        if "description" in schema:
            schema["description"] = schema["description"].split("\n\n>>>")[0]
    return schemas
