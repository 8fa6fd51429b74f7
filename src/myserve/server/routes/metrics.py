"""`GET /metrics`, for Prometheus: a table of what there is. vLLM's names where the meaning is vLLM's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from operator import attrgetter
from typing import Literal, NamedTuple

import psutil
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from myserve.engine.meters import Histogram
from myserve.server.models.models import Models, ServedModel
from myserve.server.observe.http_meters import HttpMeters
from myserve.server.routes.body import models_of

router = APIRouter()

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]
Value = float | Histogram
Kind = Literal["counter", "gauge", "histogram"]


class OfModel(NamedTuple):
    """A number of each loaded model, or, where `label` is given, a mapping from its values to numbers."""

    name: str
    kind: Kind
    path: str  # from a ServedModel to the number
    help: str
    label: str = ""


_LOAD, _METERS = "engine.load.", "engine.meters."
OF_MODEL = (
    OfModel("vllm:num_requests_running", "gauge", _LOAD + "num_running", "Choices in the batch."),
    OfModel("vllm:num_requests_waiting", "gauge", _LOAD + "num_waiting", "Choices that wait for room in it."),
    OfModel("vllm:kv_cache_usage_perc", "gauge", _LOAD + "kv_cache_usage", "KV blocks in use; 1 is all."),
    OfModel(
        "vllm:num_preemptions_total", "counter", _LOAD + "num_preemptions", "Blocks taken from a request."
    ),
    OfModel(
        "vllm:prompt_tokens_total", "counter", _METERS + "prompt_tokens", "Of n choices once; cached too."
    ),
    OfModel("vllm:generation_tokens_total", "counter", _METERS + "generation_tokens", "Tokens drawn."),
    OfModel("vllm:prefix_cache_queries_total", "counter", _METERS + "prompt_tokens", "Tokens looked up."),
    OfModel("vllm:prefix_cache_hits_total", "counter", _METERS + "cached_prompt_tokens", "Tokens found."),
    OfModel(
        "vllm:request_success_total", "counter", _METERS + "finished", "Choices ended.", "finished_reason"
    ),
    OfModel("vllm:iteration_tokens_total", "histogram", _METERS + "step_tokens", "Tokens of a step."),
    OfModel(
        "vllm:time_to_first_token_seconds", "histogram", _METERS + "time_to_first_token", "From arrival."
    ),
    OfModel(
        "vllm:inter_token_latency_seconds", "histogram", _METERS + "inter_token_latency", "Token to token."
    ),
    OfModel("vllm:e2e_request_latency_seconds", "histogram", _METERS + "latency", "Arrival to end."),
    OfModel("vllm:request_queue_time_seconds", "histogram", _METERS + "queue_time", "Arrival to first step."),
    OfModel(
        "vllm:request_prefill_time_seconds", "histogram", _METERS + "prefill_time", "To the first token."
    ),
    OfModel("vllm:request_prompt_tokens", "histogram", _METERS + "request_prompt_tokens", "Of a choice."),
    OfModel(
        "vllm:request_generation_tokens", "histogram", _METERS + "request_generation_tokens", "Of a choice."
    ),
    OfModel("myserve:step_seconds_total", "counter", _METERS + "step_seconds", "Planning and running steps."),
    OfModel(
        "myserve:sampling_seconds_total", "counter", _METERS + "sampling_seconds", "Of it, in the sampler."
    ),
    OfModel("myserve:weight_version", "gauge", "engine.weight_version", "Which weights compute."),
    OfModel("myserve:engine_up", "gauge", "engine.is_alive", "1 while the engine lives."),
    OfModel("myserve:engine_restarts_total", "counter", "num_restarts", "Loads after an engine stopped."),
    OfModel("myserve:exactness", "gauge", "engine.exactness", "How rows are kept independent.", "property"),
)


@router.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(http: Request) -> Response:
    """Prometheus' text format. A scrape reads plain numbers, and no step waits for it."""
    lines = [*_of_models(models_of(http)), *_of_http(http.app.state.http_meters), *_of_process()]
    return Response("\n".join(lines) + "\n", media_type=CONTENT_TYPE)


def _of_models(models: Models) -> Iterator[str]:
    """Each engine once, under the first of its names."""
    loaded: dict[int, tuple[str, ServedModel]] = {}
    for name in models.names:
        if (model := models.if_loaded(name)) is not None:
            loaded.setdefault(id(model), (name, model))
    for family in OF_MODEL:
        samples: list[tuple[Labels, Value]] = []
        for name, model in loaded.values():
            found = attrgetter(family.path)(model)
            if family.label:
                numbers = {
                    value: number for value, number in dict(found).items() if not isinstance(number, str)
                }
                samples += [
                    ({"model_name": name, family.label: value}, number) for value, number in numbers.items()
                ]
            else:
                samples.append(({"model_name": name}, found))
        yield from _family(family.name, family.kind, family.help, samples)


def _of_http(meters: HttpMeters) -> Iterator[str]:
    requests = [
        ({"method": method, "handler": handler, "status": str(status)}, float(count))
        for (method, handler, status), count in meters.requests.copy().items()
    ]
    durations = [({"handler": handler}, seconds) for handler, seconds in meters.durations.copy().items()]
    yield from _family("http_requests_total", "counter", "Answers, by status.", requests)
    yield from _family("http_request_duration_seconds", "histogram", "To the answer's last byte.", durations)
    yield from _family(
        "myserve:http_requests_in_progress", "gauge", "Being answered.", [({}, meters.in_progress)]
    )


def _of_process() -> Iterator[str]:
    process = _process()
    cpu = process.cpu_times()
    yield from _family("myserve:build_info", "gauge", "What runs.", [({"version": version("myserve")}, 1)])
    of_process: list[tuple[str, Kind, str, float]] = [
        ("process_resident_memory_bytes", "gauge", "Memory in use.", process.memory_info().rss),
        ("process_cpu_seconds_total", "counter", "CPU time, user and system.", cpu.user + cpu.system),
        ("process_start_time_seconds", "gauge", "Unix time of the start.", process.create_time()),
        ("process_open_fds", "gauge", "Open file descriptors.", process.num_fds()),
    ]
    for name, kind, text, value in of_process:
        yield from _family(name, kind, text, [({}, value)])


@cache
def _process() -> psutil.Process:
    return psutil.Process(os.getpid())


def _family(name: str, kind: Kind, text: str, samples: Iterable[tuple[Labels, Value]]) -> Iterator[str]:
    """Help, type and samples.

    >>> list(_family("x_total", "counter", "Xs.", [({"of": 'a"b'}, 2)]))[1:]
    ['# TYPE x_total counter', 'x_total{of="a\\\\"b"} 2']
    """
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        if not isinstance(value, Histogram):
            yield f"{name}{_labels(labels)} {_number(value)}"
            continue
        counts = value.cumulative()
        for bound, count in zip((*map(_number, value.bounds), "+Inf"), counts, strict=True):
            yield f"{name}_bucket{_labels({**labels, 'le': bound})} {count}"
        yield f"{name}_sum{_labels(labels)} {_number(value.sum)}"
        yield f"{name}_count{_labels(labels)} {counts[-1]}"


_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def _labels(labels: Labels) -> str:
    return (
        "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"
        if labels
        else ""
    )


def _number(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(value)
