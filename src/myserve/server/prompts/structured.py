"""The wire's many fields for the form of an answer become one `Grammar`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from myserve.core.grammar import Grammar
from myserve.errors import RequestError
from myserve.server.prompts.structural_tag import structural_tag
from myserve.wire.fields import SamplingFields
from myserve.wire.structured import ResponseFormat, StructuredOutputs

__all__ = ["Named", "grammar_of"]

Named = tuple[str, Grammar]


def grammar_of(request: SamplingFields) -> Grammar | None:
    """Return what the text must be; None: anything. Raises RequestError for two forms at once, or an empty one.

    >>> grammar_of(SamplingFields(guided_regex="a|b")).source
    'a|b'
    >>> grammar_of(SamplingFields(regex="a", choice=("b",)))
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: regex and choice both say what the text must be: send one
    """
    forms = list(_forms(request))
    if len(forms) > 1:
        raise RequestError(
            f"{forms[0][0]} and {forms[1][0]} both say what the text must be: send one", param=forms[1][0]
        )
    return forms[0][1] if forms else None


def _forms(request: SamplingFields) -> Iterator[Named]:
    if request.response_format is not None:
        yield from _of_response_format(request.response_format)
    if request.structured_outputs is not None:
        yield from _of_structured_outputs(request.structured_outputs)
    for name in ("json_schema", "regex", "choice", "grammar"):
        yield from _maybe(name, name, getattr(request, name))
    for name in ("json", "regex", "choice", "grammar"):
        yield from _maybe(f"guided_{name}", name, getattr(request, f"guided_{name}"))


def _of_response_format(form: ResponseFormat) -> Iterator[Named]:
    name = "response_format"
    match form.type:
        case "json_object" if form.schema_ is None:
            yield name, Grammar.json_object()
        case "json_object" | "json_schema":
            yield from _maybe(name, "json", form.json_schema.schema_ if form.json_schema else form.schema_)
        case "regex" | "grammar":
            yield from _maybe(name, form.type, getattr(form, form.type))
        case "structural_tag":
            older = {"structures": form.structures, "triggers": form.triggers}
            yield from _maybe(name, form.type, older if form.format is None else {"format": form.format})


def _of_structured_outputs(wanted: StructuredOutputs) -> Iterator[Named]:
    name = "structured_outputs"
    for unknown in wanted.model_extra or {}:
        if (wanted.model_extra or {})[unknown] not in (None, False):
            raise RequestError(f"{name}.{unknown} is not supported by this server", param=f"{name}.{unknown}")
    if wanted.json_object:
        yield name, Grammar.json_object()
    yield from _maybe(name, "json", wanted.json_)
    for kind in ("regex", "choice", "grammar", "structural_tag"):
        yield from _maybe(name, kind, getattr(wanted, kind))


def _maybe(name: str, kind: str, value: Any) -> Iterator[Named]:
    if value is not None:
        try:
            yield name, _MAKE[kind](value)
        except RequestError as error:
            raise RequestError(f"{name}: {error}", param=name) from None


def _schema(value: Any) -> Grammar:
    """Return the grammar of a schema, given as an object or as the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the schema is not valid JSON: {error}") from None
    if not isinstance(value, dict | bool):
        raise RequestError(f"a schema must be an object, got {value!r:.80}")
    return Grammar.json_schema(value)


_MAKE: dict[str, Callable[[Any], Grammar]] = {
    "json": _schema,
    "json_schema": _schema,
    "regex": lambda text: Grammar("regex", text),
    "grammar": lambda text: Grammar("lark", text),
    "choice": Grammar.choice,
    "structural_tag": structural_tag,
}
