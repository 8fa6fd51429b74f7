"""`GET /metrics`: a table of what each engine counts, given to Prometheus' own client; vLLM's names where they fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from myserve.engine.meters import Histogram
from myserve.server.models.models import Models, ServedModel
from myserve.server.models.replicas import replicas_of
from myserve.server.observe.http_meters import HttpMeters, LoopWatchdog

__all__ = ["registry_of", "router"]

router = APIRouter()

Value = float | Histogram
Kind = Literal["counter", "gauge", "histogram"]


class ModelMetric(NamedTuple):
    """A number of each loaded model; where `label` is given, a mapping from the label's values to numbers."""

    name: str
    kind: Kind
    path: str  # from a ServedModel to the number
    help: str
    label: str = ""


_LOAD, _METERS, _DRAFTS = "engine.load.", "engine.meters.", "engine.meters.drafts."
OF_MODELS = (
    ModelMetric("vllm:num_requests_running", "gauge", _LOAD + "num_running", "Choices in the batch."),
    ModelMetric(
        "vllm:num_requests_waiting", "gauge", _LOAD + "num_waiting", "Choices that wait for room in it."
    ),
    ModelMetric("vllm:kv_cache_usage_perc", "gauge", _LOAD + "kv_cache_usage", "KV blocks in use; 1 is all."),
    ModelMetric(
        "vllm:num_preemptions_total", "counter", _LOAD + "num_preemptions", "Blocks taken from a request."
    ),
    ModelMetric(
        "vllm:prompt_tokens_total", "counter", _METERS + "prompt_tokens", "Of n choices once; cached too."
    ),
    ModelMetric("vllm:generation_tokens_total", "counter", _METERS + "generation_tokens", "Tokens drawn."),
    ModelMetric("vllm:prefix_cache_queries_total", "counter", _METERS + "prompt_tokens", "Tokens looked up."),
    ModelMetric("vllm:prefix_cache_hits_total", "counter", _METERS + "cached_prompt_tokens", "Tokens found."),
    ModelMetric(
        "vllm:request_success_total", "counter", _METERS + "finished", "Choices ended.", "finished_reason"
    ),
    ModelMetric("vllm:iteration_tokens_total", "histogram", _METERS + "step_tokens", "Tokens of a step."),
    ModelMetric(
        "vllm:time_to_first_token_seconds", "histogram", _METERS + "time_to_first_token", "From arrival."
    ),
    ModelMetric(
        "vllm:inter_token_latency_seconds", "histogram", _METERS + "inter_token_latency", "Token to token."
    ),
    ModelMetric("vllm:e2e_request_latency_seconds", "histogram", _METERS + "latency", "Arrival to end."),
    ModelMetric(
        "vllm:request_queue_time_seconds", "histogram", _METERS + "queue_time", "Arrival to first step."
    ),
    ModelMetric(
        "vllm:request_prefill_time_seconds", "histogram", _METERS + "prefill_time", "To the first token."
    ),
    ModelMetric("vllm:request_prompt_tokens", "histogram", _METERS + "request_prompt_tokens", "Of a choice."),
    ModelMetric(
        "vllm:request_generation_tokens", "histogram", _METERS + "request_generation_tokens", "Of a choice."
    ),
    ModelMetric("vllm:spec_decode_num_drafts_total", "counter", _DRAFTS + "drafts", "Drafts verified."),
    ModelMetric(
        "vllm:spec_decode_num_draft_tokens_total", "counter", _DRAFTS + "draft_tokens", "Tokens of drafts."
    ),
    ModelMetric(
        "vllm:spec_decode_num_accepted_tokens_total",
        "counter",
        _DRAFTS + "accepted_tokens",
        "Of them, drawn.",
    ),
    ModelMetric(
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
        "counter",
        _DRAFTS + "accepted_by_position",
        "By place in the draft, from 0.",
        "position",
    ),
    ModelMetric(
        "myserve:draft_tokens_total", "counter", _DRAFTS + "draft_tokens_by_drafter", "Drafted.", "drafter"
    ),
    ModelMetric(
        "myserve:accepted_draft_tokens_total", "counter", _DRAFTS + "accepted_by_drafter", "Drawn.", "drafter"
    ),
    ModelMetric(
        "myserve:step_seconds_total", "counter", _METERS + "step_seconds", "Planning and running steps."
    ),
    ModelMetric(
        "myserve:sampling_seconds_total", "counter", _METERS + "sampling_seconds", "Of it, in the sampler."
    ),
    ModelMetric("myserve:weight_version", "gauge", "engine.weight_version", "Which weights compute."),
    ModelMetric("myserve:engine_up", "gauge", "engine.is_alive", "1 while the engine lives."),
    ModelMetric("myserve:engine_restarts_total", "counter", "num_restarts", "Loads after an engine stopped."),
    ModelMetric(
        "myserve:exactness", "gauge", "engine.exactness", "How rows are kept independent.", "property"
    ),
)


@router.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(http: Request) -> Response:
    """Return all metrics in the format that the scraper asks for. A scrape reads plain numbers; no step waits."""
    encode, content_type = choose_encoder(http.headers.get("accept", ""))
    return Response(encode(http.app.state.metrics), media_type=content_type, headers={"vary": "accept"})


def registry_of(models: Models, meters: HttpMeters, watchdog: LoopWatchdog) -> CollectorRegistry:
    """Return a registry of this application's metrics and the process' own; nothing is shared with another."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(models, meters, watchdog))
    ProcessCollector(registry=registry)
    return registry


class _Collector(Collector):
    """Yields the metrics of engines, HTTP and event loop as they are now."""

    def __init__(self, models: Models, meters: HttpMeters, watchdog: LoopWatchdog) -> None:
        self._models = models
        self._meters = meters
        self._watchdog = watchdog

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield from self._of_models()
        yield from self._of_http()
        yield _family("myserve:build_info", "gauge", "What runs.", ["version"], [([version("myserve")], 1)])

    def _of_models(self) -> Iterator[Metric]:
        """Yield the table's families; each engine is there once, under the first of its names."""
        loaded: dict[int, tuple[str, ServedModel]] = {}
        for name in self._models.names:
            if (model := self._models.if_loaded(name)) is not None:
                loaded.setdefault(id(model), (name, model))
        parts = [part for name, model in loaded.values() for part in _parts_of(name, model)]
        # of a fleet each replica has its samples, with a label that no other server's have
        named = ["model_name", "replica"] if any(len(values) > 1 for values, _ in parts) else ["model_name"]
        for metric in OF_MODELS:
            labels = [*named, metric.label] if metric.label else named
            samples: list[tuple[list[str], Value]] = []
            for values, part in parts:
                values = [*values, *[""] * (len(named) - len(values))]
                found = attrgetter(metric.path)(part)
                if metric.label:
                    numbers = {value: n for value, n in dict(found).items() if not isinstance(n, str)}
                    samples += [([*values, value], number) for value, number in numbers.items()]
                else:
                    samples.append((values, found))
            yield _family(metric.name, metric.kind, metric.help, labels, samples)
        yield from _of_fleets(dict(loaded.values()))

    def _of_http(self) -> Iterator[Metric]:
        requests = [
            ([method, handler, str(status)], count)
            for (method, handler, status), count in self._meters.requests.copy().items()
        ]
        durations = [([handler], seconds) for handler, seconds in self._meters.durations.copy().items()]
        labels = ["method", "handler", "status"]
        yield _family("http_requests_total", "counter", "Answers, by status.", labels, requests)
        seconds = "http_request_duration_seconds"
        yield _family(seconds, "histogram", "To the answer's last byte.", ["handler"], durations)
        in_progress = "myserve:http_requests_in_progress"
        yield _family(in_progress, "gauge", "Being answered.", [], [([], self._meters.in_progress)])
        lag = "myserve:event_loop_lag_seconds"
        yield _family(lag, "histogram", "How late the event loop runs.", [], [([], self._watchdog.lag)])


def _parts_of(name: str, model: ServedModel) -> list[tuple[list[str], Any]]:
    """Return what a model's numbers are read from, with its labels' values: a fleet's replicas, one by one."""
    replicas = replicas_of(model.engine)
    if replicas is None:
        return [([name], model)]
    return [([name, replica], view) for replica, view in replicas.items()]


def _of_fleets(models: Mapping[str, ServedModel]) -> Iterator[Metric]:
    """Yield where requests went, and why; nothing where no fleet is served."""
    fleets = {
        name: found for name, model in models.items() if (found := replicas_of(model.engine)) is not None
    }
    if not fleets:
        return
    views = [([name, replica], view) for name, found in fleets.items() for replica, view in found.items()]
    labels = ["model_name", "replica"]
    routed = [
        ([*values, reason], count) for values, view in views for reason, count in dict(view.requests).items()
    ]
    yield _family(
        "myserve:routed_requests_total", "counter", "Sent there, and why.", [*labels, "reason"], routed
    )
    for metric, path, text in (
        ("myserve:routed_prompt_tokens_total", "prompt_tokens", "Tokens of prompts sent there."),
        ("myserve:routed_hit_tokens_total", "hit_tokens", "Of them, those that its cache should have held."),
    ):
        yield _family(metric, "counter", text, labels, [(v, getattr(view, path)) for v, view in views])
    moved = [([name], float(getattr(models[name].engine, "num_moved", 0))) for name in fleets]
    yield _family(
        "myserve:moved_choices_total", "counter", "Went on at another replica.", ["model_name"], moved
    )


def _family(
    name: str, kind: Kind, text: str, labels: list[str], samples: Iterable[tuple[list[str], Value]]
) -> Metric:
    """Return one family of metrics with its samples: label values, and a number or a histogram."""
    families: dict[Kind, Any] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    family: Any = families[kind](name, text, labels=labels)
    for values, value in samples:
        if isinstance(value, Histogram):
            bounds = [*map(floatToGoString, value.bounds), "+Inf"]
            family.add_metric(values, list(zip(bounds, value.cumulative(), strict=True)), value.sum)
        else:
            family.add_metric(values, value)
    return family  # type: ignore[no-any-return]  # one of three classes with the same base
