"""/metrics as Prometheus' own parser reads it, after traffic whose every token is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from myserve.server.settings import Settings

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def own(
    tiny_model: Callable[[str], Path], open_server: Callable[[Settings], AbstractContextManager[Any]]
) -> Iterator[Any]:
    """A server whose counters start at zero; the model has two names."""
    path = str(tiny_model("qwen3"))
    with open_server(Settings(models={"tiny": path, "alias": path})) as server:
        yield server


def scrape(url: str) -> Samples:
    answer = httpx.get(url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """The one sample of that name that has these labels."""
    (found,) = [
        number
        for (of, given), number in samples.items()
        if of == name and set(labels.items()) <= given
    ]  # fmt: skip
    return found


def test_every_token_is_counted(own: Any, wait_until: Callable[[Callable[[], bool]], None]) -> None:
    client = openai.OpenAI(base_url=f"{own.url}/v1", api_key="any", max_retries=0)

    def complete(**fields: Any) -> Any:
        return client.completions.create(
            **{"model": "alias", "prompt": [7] * 40, "max_tokens": 5, "seed": 1, "n": 2} | fields,
            extra_body={"ignore_eos": True},
        )

    complete()
    first = scrape(own.url)
    assert value(first, "vllm:prompt_tokens_total", model_name="tiny") == 40  # of two choices, once
    assert value(first, "vllm:generation_tokens_total") == 10
    assert value(first, "vllm:time_to_first_token_seconds_count") == 2
    assert value(first, "vllm:inter_token_latency_seconds_count") == 2 * 4
    assert value(first, "vllm:request_success_total", finished_reason="length") == 2
    assert value(first, "vllm:request_generation_tokens_sum") == 10
    assert value(first, "vllm:prefix_cache_hits_total") == 0
    assert value(first, "vllm:num_requests_running") == value(first, "vllm:kv_cache_usage_perc") == 0
    step, sampling = (value(first, f"myserve:{which}_seconds_total") for which in ("step", "sampling"))
    assert 0 < sampling < step

    text = complete().choices[0].text
    complete(n=1, stop=text[:2], max_tokens=400)  # so long that the engine cannot be there first
    again = scrape(own.url)
    # Greedily found: whole blocks alone, and one token is always left to run.
    assert value(again, "vllm:prefix_cache_queries_total") == 120
    assert 0 < value(again, "vllm:prefix_cache_hits_total") < 80
    assert value(again, "vllm:request_success_total", finished_reason="length") == 4

    def ended(reason: str) -> float:
        return value(scrape(own.url), "vllm:request_success_total", finished_reason=reason)

    wait_until(lambda: ended("stop") == 1)  # the stop string's abort is not counted as one
    stream = complete(stream=True, max_tokens=400)
    assert next(iter(stream))
    assert value(scrape(own.url), "vllm:num_requests_running") == 2
    stream.close()
    wait_until(lambda: ended("abort") == 2)
    assert ended("error") == 0


def test_what_runs_and_how_exactly(own: Any) -> None:
    samples = scrape(own.url)
    assert value(samples, "myserve:engine_up", model_name="tiny") == 1
    assert value(samples, "myserve:weight_version") == 0
    assert value(samples, "myserve:exactness", property="rows_are_independent") == 1
    assert value(samples, "process_resident_memory_bytes") > 1e6
    own.model("tiny").engine.shutdown()
    assert value(scrape(own.url), "myserve:engine_up") == 0


def test_answers_are_counted_by_route_and_status_and_never_by_path(
    own: Any, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    httpx.get(own.url + "/v1/models/tiny")
    httpx.post(own.url + "/v1/completions", json={})
    for path in ("/a", "/b"):
        httpx.get(own.url + path)
    # an answer counts when its last byte is out
    wait_until(lambda: own.app.state.http_meters.in_progress == 0)
    samples = scrape(own.url)
    assert value(samples, "http_requests_total", handler="/v1/models/{name:path}", status="200") == 1
    assert value(samples, "http_requests_total", handler="/v1/completions", status="400") == 1
    assert value(samples, "http_requests_total", handler="none", status="404") == 2
    assert value(samples, "myserve:http_requests_in_progress") == 1  # this scrape


def test_histograms_are_cumulative(own: Any) -> None:
    body = {"model": "tiny", "prompt": [5], "max_tokens": 9, "ignore_eos": True}
    httpx.post(own.url + "/v1/completions", json=body)
    name = "vllm:inter_token_latency_seconds_bucket"
    buckets = [
        (float(dict(labels)["le"]), number) for (of, labels), number in scrape(own.url).items() if of == name
    ]
    counts = [count for _, count in sorted(buckets)]
    assert counts == sorted(counts) and counts[-1] == 8


def test_a_number_that_is_none_is_a_sample_and_not_a_500(own: Any) -> None:
    meters = own.model("tiny").engine.meters
    meters.step_seconds, meters.sampling_seconds = float("nan"), float("inf")
    samples = scrape(own.url)
    assert math.isnan(value(samples, "myserve:step_seconds_total"))
    assert value(samples, "myserve:sampling_seconds_total") == math.inf


def test_invented_methods_make_no_series(own: Any, wait_until: Callable[[Callable[[], bool]], None]) -> None:
    for number in range(5):
        assert httpx.request(f"BREW{number}", own.url + "/v1/models").status_code == 405
    wait_until(lambda: own.app.state.http_meters.in_progress == 0)
    assert value(scrape(own.url), "http_requests_total", method="_OTHER", status="405") == 5
    methods = {dict(labels).get("method") for _, labels in scrape(own.url)} - {None}
    assert methods <= {"GET", "POST", "_OTHER"}


def test_a_scraper_that_asks_for_openmetrics_gets_it(own: Any) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = httpx.get(own.url + "/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.headers["vary"] == "accept"
    parsed = {family.name for family in openmetrics_families(answer.text)}
    assert {"vllm:generation_tokens", "myserve:event_loop_lag_seconds", "process_cpu_seconds"} <= parsed


def test_two_applications_in_a_process_share_no_metric(own: Any, open_server: Any) -> None:
    with open_server(Settings(models={"other": "x"}, force_echo=True)) as other:
        assert not any(dict(labels).get("model_name") == "tiny" for _, labels in scrape(other.url))
        assert value(scrape(other.url), "myserve:engine_up", model_name="other") == 1
