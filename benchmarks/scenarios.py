"""Loads whose requests come at moments of their own: a long prompt beside running streams, and Poisson arrivals.

Pure: what is sent when, and what figures come of it. `contender.py` sends, `__main__.py` takes turns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from myserve.bench.figures import RequestTimes, percentile

STREAMS = 8
JOINS_AT_S = 4.0  # when all of the streams have begun, on any contender that was measured here
LONG_PROMPT = 2048
REQUESTS = 40
LOAD = 0.9  # of the requests a second that ours answers when all come at once
SHORT = 256  # tokens: below, a prompt is a short one
# A request meets its service level where its first token came within so many seconds, and the others so many apart on
# average: a person reads on at four tokens a second.
FIRST_TOKEN_S, BETWEEN_TOKENS_S = 2.0, 0.25
_PROMPTS, _OUTPUTS = (32, 1024), (16, 128)  # tokens: lengths are drawn evenly by their logarithm

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Planned:
    """Hold one request of a load: seconds after its begin, tokens of its prompt and of its completion."""

    at: float
    prompt_len: int
    output_len: int


def prompt_beside_streams() -> list[Planned]:
    """Return eight streams that begin at once, and a prompt of 2,048 tokens that comes in while they decode."""
    streams = [Planned(0.0, 64, 160) for _ in range(STREAMS)]
    return [*streams, Planned(JOINS_AT_S, LONG_PROMPT, 4)]


def beside_streams_figures(traces: Sequence[RequestTimes]) -> dict[str, float]:
    """Return ms: the prompt's time to its first token, the streams' gaps before it came and while it waited."""
    *streams, prompt = traces
    first = prompt.times[0]
    before = _gaps(streams, 0.0, prompt.started)
    beside = _gaps(streams, prompt.started, first)
    return {
        "TTFT": 1e3 * (first - prompt.started),
        "before p50": 1e3 * percentile(before, 50),
        "beside p50": 1e3 * percentile(beside, 50),
        "beside p99": 1e3 * percentile(beside, 99),
        "beside max": 1e3 * max(beside),
    }


def _gaps(traces: Sequence[RequestTimes], begin: float, end: float) -> list[float]:
    """Return the seconds between two tokens of a stream, of the pairs that end inside the window; [inf] for none."""
    gaps = [
        later - earlier
        for trace in traces
        for earlier, later in pairwise(trace.times)
        if begin < later <= end and earlier >= traces[0].times[0]
    ]
    return gaps or [math.inf]


def burst(seed: int, requests: int = REQUESTS) -> list[Planned]:
    """Return requests that all come at once: how many a second are answered is a server's capacity."""
    return _drawn(random.Random(seed), requests, rate=None)


def poisson(seed: int, rate: float, requests: int = REQUESTS) -> list[Planned]:
    """Return requests that come independently of one another, `rate` a second on average.

    >>> [(round(p.at, 1), p.prompt_len, p.output_len) for p in poisson(0, rate=0.5, requests=2)]
    [(3.7, 443, 38), (4.3, 188, 37)]
    """
    return _drawn(random.Random(seed), requests, rate)


def _drawn(draw: random.Random, requests: int, rate: float | None) -> list[Planned]:
    at, planned = 0.0, []
    for _ in range(requests):
        at += draw.expovariate(rate) if rate else 0.0
        planned.append(Planned(at, _length(draw, *_PROMPTS), _length(draw, *_OUTPUTS)))
    return planned


def _length(draw: random.Random, least: int, most: int) -> int:
    return round(math.exp(draw.uniform(math.log(least), math.log(most))))


def capacity(traces: Sequence[RequestTimes]) -> float:
    """Return the requests a second of a burst."""
    return len(traces) / (max(trace.times[-1] for trace in traces) - min(trace.started for trace in traces))


def poisson_figures(traces: Sequence[RequestTimes]) -> dict[str, float]:
    """Return ms, and requests a second that met their service level (`goodput`) of those that came."""
    short = [trace.times[0] - trace.started for trace in traces if trace.prompt_tokens < SHORT]
    every = [trace.times[0] - trace.started for trace in traces]
    gaps = [later - earlier for trace in traces for earlier, later in pairwise(trace.times)]
    wall = max(trace.times[-1] for trace in traces) - min(trace.started for trace in traces)
    return {
        "short TTFT p50": 1e3 * percentile(short, 50),
        "TTFT p50": 1e3 * percentile(every, 50),
        "TTFT p99": 1e3 * percentile(every, 99),
        "between p50": 1e3 * percentile(gaps, 50),
        "between p99": 1e3 * percentile(gaps, 99),
        "goodput, req/s": sum(map(_meets_service_level, traces)) / wall,
    }


def _meets_service_level(trace: RequestTimes) -> bool:
    if trace.times[0] - trace.started > FIRST_TOKEN_S:
        return False
    return trace.times[-1] - trace.times[0] <= BETWEEN_TOKENS_S * max(1, trace.tokens - 1)
