"""OpenTelemetry traces: a span for each request, the engine's phases below it, and no text of prompt or answer.

Phases are recorded when a request has ended, from times that the engine takes anyway: no step waits for a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from myserve.engine.outputs import RequestMetrics
from myserve.errors import RequestError
from myserve.server.choice import Choice
from myserve.server.observe.http_meters import method_label
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.fields import GenerationRequest

__all__ = ["OtlpTraces", "RequestTrace"]

# called every few seconds, and not worth a span
PROBES = frozenset({"/health", "/healthz", "/ready", "/metrics"})
# a request's fields under the names of OpenTelemetry's GenAI conventions; `stop` is text, and is left out
REQUEST_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "max_tokens",
    "stream",
)
# OTLP's integers are signed, and seeds are not
MAX_INT = 2**63 - 1

Attributes = dict[str, Any]


class OtlpTraces:
    """Sends spans over OTLP/HTTP to `endpoint`; everything else is set by OTEL_* in the environment.

    >>> OtlpTraces("collector:4318")
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: otlp_traces_endpoint must be a URL such as http://localhost:4318/v1/traces, got ...
    """

    def __init__(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise RequestError(
                f"otlp_traces_endpoint must be a URL such as http://localhost:4318/v1/traces, got {endpoint!r}",
                param="otlp_traces_endpoint",
            )
        if find_spec("opentelemetry.sdk") is None or find_spec("opentelemetry.exporter") is None:
            raise RequestError(
                "traces need an exporter, which this server was installed without: pip install 'myserve[otel]'",
                param="otlp_traces_endpoint",
            )
        self._endpoint = endpoint

    def begin(self, scope: Scope, request_id: str) -> RequestTrace | None:
        """Begin a request's span, as a child of the client's where it sent a `traceparent`; None for a probe."""
        if scope["path"] in PROBES:
            return None
        method = method_label(scope["method"])
        span = self._tracer.start_span(
            method,
            context=TraceContextTextMapPropagator().extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.request.header.x-request-id": [request_id]},
        )
        return RequestTrace(self._tracer, span, method)

    def flush(self) -> None:
        """Send the spans that were not sent yet. Blocks."""
        self._provider.force_flush()

    def close(self) -> None:
        """Flush, and end the thread that sends."""
        if "_provider" in self.__dict__:
            self._provider.shutdown()

    @property
    def _tracer(self) -> Tracer:
        tracer: Tracer = self._provider.get_tracer("myserve", version("myserve"))
        return tracer

    # it has a thread, and making an application starts none
    @cached_property
    def _provider(self) -> Any:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = Resource.create({"service.name": "myserve", "service.version": version("myserve")})
        provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(self._endpoint)))
        return provider


class RequestTrace:
    """One request's span while it is answered."""

    def __init__(self, tracer: Tracer, span: Span, method: str) -> None:
        self._tracer = tracer
        self._span = span
        self._method = method

    @property
    def trace_id(self) -> str:
        """Return the trace's id as logs and collectors write it."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def record(
        self,
        request: GenerationRequest,
        response_id: str,
        choices: Sequence[Choice],
        costs: Sequence[RequestMetrics],
    ) -> None:
        """Record the request's parameters and its choices; `costs` has each choice's, ended or not."""
        if not self._span.is_recording():
            return
        self._span.set_attributes(_attributes(request, response_id, choices, costs))
        below = set_span_in_context(self._span)
        seen: set[int] = set()
        for choice, cost in zip(choices, costs, strict=True):
            # the prompt's other choices wait for its prefill and share it
            leads = choice.prompt not in seen
            seen.add(choice.prompt)
            for name, began, ended in _phases(cost):
                if leads or name == "decode":
                    attributes = {"gen_ai.request.choice.index": choice.index} | _of_phase(name, choice, cost)
                    start = _nanoseconds(began)
                    span = self._tracer.start_span(name, below, attributes=attributes, start_time=start)
                    span.end(_nanoseconds(ended))

    def fail(self, error: Exception) -> None:
        """Record an error's type; its message may quote the request."""
        self._span.set_attribute("error.type", type(error).__name__)
        self._span.set_status(Status(StatusCode.ERROR))

    def end(self, route: str, status: int, *, cut: bool) -> None:
        """End the span; `cut` says that the answer's last byte is not out."""
        self._span.update_name(f"{self._method} {route}")
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if cut:
            self._span.set_attribute("myserve.cut", True)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _attributes(
    request: GenerationRequest, response_id: str, choices: Sequence[Choice], costs: Sequence[RequestMetrics]
) -> Attributes:
    prompts = {choice.prompt: cost for choice, cost in reversed(list(zip(choices, costs, strict=True)))}
    asked: Mapping[str, Any] = {name: getattr(request, name) for name in REQUEST_FIELDS} | {
        "model": request.model,
        "choice.count": len(choices),
        "seed": request.seed if (request.seed or 0) <= MAX_INT else None,
    }
    attributes = {f"gen_ai.request.{name}": value for name, value in asked.items() if value is not None}
    return attributes | {
        "gen_ai.operation.name": "chat" if isinstance(request, ChatCompletionRequest) else "text_completion",
        "gen_ai.provider.name": "myserve",
        "gen_ai.response.id": response_id,
        "gen_ai.response.model": request.model,
        "gen_ai.response.finish_reasons": [_finish_reason(choice) for choice in choices],
        "gen_ai.usage.input_tokens": sum(cost.prompt_tokens for cost in prompts.values()),
        "gen_ai.usage.cache_read.input_tokens": sum(cost.cached_tokens for cost in prompts.values()),
        "gen_ai.usage.output_tokens": sum(len(choice.sampled) for choice in choices),
    }


def _finish_reason(choice: Choice) -> str:
    reason = choice.last.finish_reason if choice.last is not None else None
    return reason or "abort"


def _phases(cost: RequestMetrics) -> Iterator[tuple[str, float, float]]:
    """Yield name, beginning and end, in unix seconds, of each phase that took time.

    >>> [(name, end - began) for name, began, end in _phases(RequestMetrics(arrival_time=8.0, prefill_duration=0.5))]
    [('prefill', 0.5)]
    """
    at = cost.arrival_time
    for name, seconds in (
        ("queue", cost.prefill_queue_duration),
        ("prefill", cost.prefill_duration),
        ("decode", cost.generation_duration),
    ):
        if seconds > 0:
            yield name, at, at + seconds
        at += seconds


def _of_phase(name: str, choice: Choice, cost: RequestMetrics) -> Attributes:
    match name:
        case "prefill":
            return {
                "gen_ai.usage.input_tokens": cost.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": cost.cached_tokens,
            }
        case "decode":
            return {
                "gen_ai.usage.output_tokens": len(choice.sampled),
                "gen_ai.response.finish_reasons": [_finish_reason(choice)],
            }
    return {}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
