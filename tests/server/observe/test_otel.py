"""Traces as a collector gets them: OTLP over HTTP from a real server, phases in their order, no word of a prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from myserve.errors import RequestError
from myserve.server.app import create_app
from myserve.server.settings import Settings

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SECRET = "My name is Ulrike"


class Collector:
    """What an OpenTelemetry collector does with a POST to /v1/traces."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    @property
    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    thread = threading.Thread(target=running.server.serve_forever)
    thread.start()
    yield running
    running.server.shutdown()
    thread.join()
    running.server.server_close()


@pytest.fixture(scope="module")
def traced(
    collector: Collector,
    tiny_model: Callable[[str], Path],
    open_server: Callable[[Settings], AbstractContextManager[Any]],
) -> Iterator[Any]:
    models = {"tiny": str(tiny_model("qwen3"))}
    with open_server(Settings(models=models, otlp_traces_endpoint=collector.url)) as server:
        yield server


@pytest.fixture
def ask(
    traced: Any, collector: Collector, wait_until: Callable[[Callable[[], bool]], None]
) -> Callable[..., list[Span]]:
    """Sends a request and gives the spans that came of it, the request's own first."""

    def send(path: str = "/v1/completions", **fields: Any) -> list[Span]:
        headers = fields.pop("headers", {})
        whole = {"model": "tiny", "prompt": [7] * 20, "max_tokens": 5, "ignore_eos": True} | fields
        collector.bodies.clear()
        httpx.post(traced.url + path, json=whole, headers=headers)
        wait_until(lambda: traced.app.state.http_meters.in_progress == 0)
        traced.app.state.traces.flush()
        return sorted(collector.spans, key=lambda span: span.kind != Span.SpanKind.SPAN_KIND_SERVER)

    return send


def attributes(span: Span) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        found = getattr(value, kind)
        return [plain(one) for one in found.values] if kind == "array_value" else found

    return {pair.key: plain(pair.value) for pair in span.attributes}


def test_a_request_is_a_span_with_the_engines_phases_below_it(ask: Callable[..., list[Span]]) -> None:
    root, *phases = ask(headers=SAMPLED | {"x-request-id": "r-1"}, temperature=0.5, seed=3)
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert root.name == "POST /v1/completions"
    said = attributes(root)
    expected = {
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "http.request.header.x-request-id": ["r-1"],
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert expected.items() <= said.items()
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    at = root.start_time_unix_nano
    for span in phases:
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
        assert at - 1e6 <= span.start_time_unix_nano < span.end_time_unix_nano  # two clocks: within 1 ms
        at = span.end_time_unix_nano
    assert at <= root.end_time_unix_nano + 1e6


def test_a_stream_is_traced_to_its_end(ask: Callable[..., list[Span]]) -> None:
    messages = [{"role": "user", "content": SECRET}]
    root, *phases = ask("/v1/chat/completions", messages=messages, stream=True, prompt=None)
    assert attributes(root)["gen_ai.operation.name"] == "chat"
    assert attributes(root)["gen_ai.usage.output_tokens"] == 5
    assert phases[-1].name == "decode" and phases[-1].end_time_unix_nano <= root.end_time_unix_nano + 1e6
    assert root.parent_span_id == b""


def test_choices_share_a_prefill_and_decode_each(ask: Callable[..., list[Span]]) -> None:
    root, *phases = ask(n=3)
    names = [span.name for span in phases]
    assert names.count("prefill") == 1 and names.count("decode") == 3
    decodes = [attributes(span) for span in phases if span.name == "decode"]
    assert [said["gen_ai.request.choice.index"] for said in decodes] == [0, 1, 2]
    assert attributes(root)["gen_ai.usage.input_tokens"] == 20
    assert attributes(root)["gen_ai.usage.output_tokens"] == 15


def test_a_seed_that_otlp_cannot_say_is_left_out(ask: Callable[..., list[Span]]) -> None:
    assert "gen_ai.request.seed" not in attributes(ask(seed=2**64 - 1)[0])


def test_a_refusal_has_no_phases_and_is_no_error_of_ours(ask: Callable[..., list[Span]]) -> None:
    (root,) = ask(temperature=-1)
    assert attributes(root)["http.response.status_code"] == 400
    assert root.status.code == 0


def test_who_is_left_is_traced_as_far_as_it_came(
    traced: Any, collector: Collector, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    collector.bodies.clear()
    body = {"model": "tiny", "prompt": [5], "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", traced.url + "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        for _ in range(12):  # some tokens: of one there is no decoding
            next(lines)
    wait_until(lambda: traced.app.state.http_meters.in_progress == 0)
    traced.app.state.traces.flush()
    by_name = {span.name: attributes(span) for span in collector.spans}
    assert by_name["POST /v1/completions"]["myserve.cut"] is True
    assert by_name["decode"]["gen_ai.response.finish_reasons"] == ["abort"]


def test_the_clients_no_is_a_no(ask: Callable[..., list[Span]]) -> None:
    assert ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}) == []
    assert len(ask(headers={"traceparent": "no trace at all"})) == 4


def test_no_word_of_a_request_is_exported(ask: Callable[..., list[Span]], collector: Collector) -> None:
    ask(prompt=SECRET, stop=[SECRET], user=SECRET, headers={"authorization": f"Bearer {SECRET}"})
    ask(prompt=SECRET, regex=f"({SECRET}")
    sent = b"".join(collector.bodies)
    assert b"POST /v1/completions" in sent
    assert not any(word.encode() in sent for word in SECRET.split()[-1:])


def test_probes_are_not_traced_and_the_log_names_the_trace(
    traced: Any, ask: Callable[..., list[Span]], collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/health", "/ready", "/metrics"):
        httpx.get(traced.url + path)
    caplog.set_level("INFO", "myserve.access")
    assert len(ask(headers=SAMPLED)) == 4
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    assert TRACE in [line.get("trace_id") for line in fields]


def test_the_resource_says_who_it_is(ask: Callable[..., list[Span]], collector: Collector) -> None:
    ask()
    said = {
        pair.key: pair.value.string_value
        for pair in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert said["service.name"] == "myserve"


def test_without_an_endpoint_there_are_none(server: Any, collector: Collector) -> None:
    collector.bodies.clear()
    body = {"model": "tiny", "prompt": [5], "max_tokens": 2}
    assert httpx.post(server.url + "/v1/completions", json=body, headers=SAMPLED).status_code == 200
    assert server.app.state.traces is None
    assert collector.bodies == []


def test_an_endpoint_that_is_no_url_is_refused_at_start() -> None:
    with pytest.raises(RequestError, match="must be a URL"):
        create_app(Settings(models={"m": "m"}, otlp_traces_endpoint="collector:4317"))
